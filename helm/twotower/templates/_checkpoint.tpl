{{/* Where the checkpoint comes from: a path, a volume, a mount, and an init container that fetches it once. */}}

{{/* Empty: the one in the image. */}}
{{- define "twotower.checkpointPath" -}}
{{- $checkpoint := .Values.checkpoint -}}
{{- if eq $checkpoint.source "pvc" -}}/checkpoint
{{- else if eq $checkpoint.source "image" -}}{{ printf "/checkpoint/%s" $checkpoint.image.directory | trimSuffix "/" }}
{{- else if eq $checkpoint.source "fetch" -}}{{ printf "/checkpoints/%s" (required "checkpoint.revision: a fetched checkpoint needs one: it names its place in the cache" $checkpoint.revision) }}
{{- end -}}
{{- end -}}

{{- define "twotower.checkpointVolume" -}}
{{- $checkpoint := .Values.checkpoint -}}
{{- if eq $checkpoint.source "pvc" -}}
- name: checkpoint
  persistentVolumeClaim:
    claimName: {{ required "checkpoint.pvc.claimName: the claim that holds the checkpoint" $checkpoint.pvc.claimName }}
    readOnly: true
{{- else if eq $checkpoint.source "image" -}}
- name: checkpoint
  image:
    reference: {{ required "checkpoint.image.reference: the OCI image that holds the checkpoint" $checkpoint.image.reference }}
    pullPolicy: {{ $checkpoint.image.pullPolicy }}
{{- else if eq $checkpoint.source "fetch" -}}
- name: checkpoint
{{- if eq $checkpoint.fetch.cache.kind "node" }}
  hostPath:
    path: {{ $checkpoint.fetch.cache.hostPath }}
    type: DirectoryOrCreate
{{- else }}
  persistentVolumeClaim:
    claimName: {{ required "checkpoint.fetch.cache.claimName: the claim that pods share" $checkpoint.fetch.cache.claimName }}
{{- end }}
{{- end -}}
{{- end -}}

{{- define "twotower.checkpointMount" -}}
{{- $checkpoint := .Values.checkpoint -}}
{{- if eq $checkpoint.source "pvc" -}}
- name: checkpoint
  mountPath: /checkpoint
  readOnly: true
{{- with $checkpoint.pvc.subPath }}
  subPath: {{ . }}
{{- end }}
{{- else if eq $checkpoint.source "image" -}}
- name: checkpoint
  mountPath: /checkpoint
  readOnly: true
{{- else if eq $checkpoint.source "fetch" -}}
- name: checkpoint
  mountPath: /checkpoints
  readOnly: true
{{- end -}}
{{- end -}}

{{/*
(root, role's values): whoever comes first takes the lock and fetches; others wait, and find it there. What was interrupted is begun
anew, and only what is whole gets the name that services open.
*/}}
{{- define "twotower.fetchContainer" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $fetch := $root.Values.checkpoint.fetch -}}
{{- if not $fetch.command -}}
{{- fail "checkpoint.fetch.command: what writes the checkpoint into $TARGET" -}}
{{- end -}}
- name: checkpoint
  image: {{ default (include "twotower.image" (list $root $role)) $fetch.image }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  command:
    - sh
    - -euc
    - |
      umask 022
      exec 9>"$CACHE/.$REVISION.lock"
      flock 9
      if [ -d "$CACHE/$REVISION" ]; then echo "$REVISION is there"; exit 0; fi
      rm -rf "$TARGET"
      mkdir -p "$TARGET"
      "$@"
      chmod -R a+rX "$TARGET"
      mv "$TARGET" "$CACHE/$REVISION"
    - fetch
    {{- range $fetch.command }}
    - {{ . | quote }}
    {{- end }}
  env:
    - name: CACHE
      value: /checkpoints
    - name: REVISION
      value: {{ $root.Values.checkpoint.revision | quote }}
    - name: TARGET
      value: {{ printf "/checkpoints/.%s.partial" $root.Values.checkpoint.revision | quote }}
    - name: HOME
      value: /cache
    {{- with $fetch.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $fetch.resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- $context := deepCopy $root.Values.securityContext }}
    {{- if eq $fetch.cache.kind "node" }}
    {{- /* A hostPath that the kubelet makes is root's. */}}
    {{- $context = mergeOverwrite $context (dict "runAsNonRoot" false "runAsUser" 0 "runAsGroup" 0) }}
    {{- end }}
    {{- toYaml $context | nindent 4 }}
  volumeMounts:
    - name: checkpoint
      mountPath: /checkpoints
    - name: cache
      mountPath: /cache
    - name: tmp
      mountPath: /tmp
{{- end -}}
