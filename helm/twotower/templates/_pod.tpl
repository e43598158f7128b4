{{/* The pod of a service. What differs between roles is in their values, and in their probes. */}}

{{/* (root, role's name, ports, probes): a Deployment's `template`. */}}
{{- define "twotower.pod" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $role := index $root.Values $name -}}
metadata:
  labels:
    {{- include "twotower.labels" (list $root $name) | nindent 4 }}
    {{- with $role.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $role.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "twotower.serviceAccountName" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- include "twotower.scheduling" $role | nindent 2 }}
  {{- with $role.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    - {{ toYaml (merge (deepCopy .) (dict "labelSelector" (dict "matchLabels" (fromYaml (include "twotower.selectorLabels" (list $root $name)))))) | nindent 6 | trim }}
    {{- end }}
  {{- end }}
  {{- with $role.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  # What was promised to requests under way, and some time to end in order.
  terminationGracePeriodSeconds: {{ add $role.preStopSeconds $role.drainSeconds 30 }}
  securityContext:
    {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- $fetches := eq $root.Values.checkpoint.source "fetch" }}
  {{- if or $fetches $role.extraInitContainers }}
  initContainers:
    {{- with $role.extraInitContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- if $fetches }}
    {{- include "twotower.fetchContainer" (list $root $role) | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ $name }}
      image: {{ include "twotower.image" (list $root $role) }}
      imagePullPolicy: {{ default $root.Values.image.pullPolicy (get $role.image "pullPolicy") }}
      command: [twotower, {{ $name }}]
      env:
        {{- include "twotower.env" (list $root $name) | nindent 8 }}
      {{- with $role.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        {{- toYaml (index . 2) | nindent 8 }}
      {{- toYaml (index . 3) | nindent 6 }}
      {{- if gt (int $role.preStopSeconds) 0 }}
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ $role.preStopSeconds | toString | quote }}]
      {{- end }}
      resources:
        {{- include "twotower.resources" $role | nindent 8 }}
      securityContext:
        {{- toYaml $root.Values.securityContext | nindent 8 }}
      volumeMounts:
        - name: cache
          mountPath: /cache
        - name: tmp
          mountPath: /tmp
        {{- with include "twotower.checkpointMount" $root }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- if and (eq $root.Values.redis.mode "external") $root.Values.redis.external.existingSecret }}
        - name: redis
          mountPath: /run/secrets/twotower/redis
          readOnly: true
        {{- end }}
        {{- with $role.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with $role.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    # Compiled kernels: made by the first use, and gone with the pod.
    - name: cache
      emptyDir: {}
    - name: tmp
      emptyDir: {}
    {{- with include "twotower.checkpointVolume" $root }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- if and (eq $root.Values.redis.mode "external") $root.Values.redis.external.existingSecret }}
    - name: redis
      secret:
        secretName: {{ $root.Values.redis.external.existingSecret }}
        items:
          - key: {{ $root.Values.redis.external.secretKey }}
            path: {{ $root.Values.redis.external.secretKey }}
    {{- end }}
    {{- with $role.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* Where a pod may run. */}}
{{- define "twotower.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* A role's resources, with its GPUs. */}}
{{- define "twotower.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- $gpus := int (dig "gpu" "count" 0 .) -}}
{{- if gt $gpus 0 -}}
{{- $limits := merge (dict .gpu.resource $gpus) (default dict $resources.limits) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* (root, role's name): how an upgrade replaces pods. */}}
{{- define "twotower.strategy" -}}
{{- $strategy := .strategy -}}
{{- if and (eq (toString $strategy.maxSurge) "0") (eq (toString $strategy.maxUnavailable) "0") -}}
{{- fail "strategy: maxSurge and maxUnavailable are both 0: no pod could ever be replaced" -}}
{{- end -}}
type: RollingUpdate
rollingUpdate:
  maxSurge: {{ $strategy.maxSurge }}
  maxUnavailable: {{ $strategy.maxUnavailable }}
{{- end -}}

{{/*
A tower's probes. `liveness` is answered as long as the process works: its own watch ends a process whose forward does not return or
whose port does not answer, and what is left to see from outside is one that is stopped. Readiness also says whether it takes work:
a tower that drains does not, and must not be killed for it.
*/}}
{{- define "twotower.towerProbes" -}}
startupProbe:
  grpc:
    port: {{ .ports.grpc }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ max 1 (div (add (int .startupSeconds) 4) 5) }}
readinessProbe:
  grpc:
    port: {{ .ports.grpc }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  grpc:
    port: {{ .ports.grpc }}
    service: liveness
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 3
{{- end -}}

{{/* (root, role's name): whether an autoscaler sets its replicas. */}}
{{- define "twotower.scales" -}}
{{- $root := index . 0 -}}
{{- if and (ne $root.Values.autoscaling.kind "none") (ne (index . 1) "gateway") (dig "enabled" true (index $root.Values (index . 1))) -}}yes{{- end -}}
{{- end -}}

{{/* Names of the towers that run. */}}
{{- define "twotower.towers" -}}
{{- if .Values.denoiser.enabled -}}context denoiser{{- else -}}context{{- end -}}
{{- end -}}
