{{/* How values become the environment of a service. */}}

{{/* A value as a setting's text: no number in scientific notation, lists with commas. */}}
{{- define "twotower.text" -}}
{{- if kindIs "slice" . -}}{{ join "," . }}
{{- else if kindIs "string" . -}}{{ . }}
{{- else -}}{{ toJson . }}
{{- end -}}
{{- end -}}

{{/*
(root, role's name): the container's `env`. What the chart decides cannot be given as a setting: two places that disagree would be
one too many.
*/}}
{{- define "twotower.env" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $role := index $root.Values $name -}}
{{- $gateway := eq $name "gateway" -}}
{{- $decided := dict "drain" (printf "%s.drainSeconds" $name) "checkpoint" "checkpoint.source" "revision" "checkpoint.revision"
    "model_name" "checkpoint.modelName" "redis" "redis" "redis_url" "redis" "host" "gateway.listen" "port" (printf "%s.ports.grpc" $name)
    "grpc_port" "gateway.ports.grpc" "http_port" "gateway.ports.http" "metrics_port" (printf "%s.ports.metrics" $name)
    "device" (printf "%s.gpu.count" $name) "advertise" "nothing: a context announces its pod's address" -}}
{{- $settings := mergeOverwrite (deepCopy $root.Values.settings) (deepCopy $role.settings) -}}
{{- range $key, $_ := $settings -}}
{{- with get $decided $key -}}
{{- fail (printf "settings.%s: the chart decides this one; use %s" $key .) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $settings "drain" $role.drainSeconds -}}
{{- with $root.Values.checkpoint.revision -}}{{- $_ := set $settings "revision" . -}}{{- end -}}
{{- with include "twotower.checkpointPath" $root -}}{{- $_ := set $settings "checkpoint" . -}}{{- end -}}
{{- if $gateway -}}
{{- $_ := set $settings "host" $role.listen -}}
{{- $_ := set $settings "grpc_port" $role.ports.grpc -}}
{{- $_ := set $settings "http_port" $role.ports.http -}}
{{- with $root.Values.checkpoint.modelName -}}{{- $_ := set $settings "model_name" . -}}{{- end -}}
{{- else -}}
{{- $_ := set $settings "host" "$(POD_IP)" -}}
{{- $_ := set $settings "port" $role.ports.grpc -}}
{{- $_ := set $settings "metrics_port" $role.ports.metrics -}}
{{- $_ := set $settings "device" (ternary "cuda" "cpu" (gt (int $role.gpu.count) 0)) -}}
{{- end -}}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: HOME
  value: /cache
{{- if not $gateway }}
- name: TRITON_CACHE_DIR
  value: /cache/triton
{{- end }}
{{ include "twotower.redisEnv" $root }}
{{- range $key := keys $settings | sortAlpha }}
- name: TWOTOWER_{{ upper $key }}
  value: {{ include "twotower.text" (get $settings $key) | quote }}
{{- end }}
{{- with concat $root.Values.extraEnv $role.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "twotower.redisEnv" -}}
{{- $redis := .Values.redis -}}
{{- if eq $redis.mode "bundled" -}}
{{- $at := printf "%s-redis:%d" (include "twotower.fullname" .) (int $redis.bundled.port) -}}
{{- if $redis.bundled.auth.existingSecret -}}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ $redis.bundled.auth.existingSecret }}
      key: {{ $redis.bundled.auth.secretKey }}
- name: TWOTOWER_REDIS_URL
  value: {{ printf "redis://:$(REDIS_PASSWORD)@%s" $at | quote }}
{{- else -}}
- name: TWOTOWER_REDIS_URL
  value: {{ printf "redis://%s" $at | quote }}
{{- end -}}
{{- else if $redis.external.existingSecret -}}
- name: TWOTOWER_REDIS_URL_FILE
  value: {{ printf "/run/secrets/twotower/redis/%s" $redis.external.secretKey }}
{{- else -}}
- name: TWOTOWER_REDIS_URL
  value: {{ required "redis.external.url or redis.external.existingSecret: one of them must be given" $redis.external.url | quote }}
{{- end -}}
{{- end -}}
