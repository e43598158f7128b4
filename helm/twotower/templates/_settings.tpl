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
    "min_denoisers" "denoiser.autoscaling.minReplicas" "max_denoisers" "denoiser.autoscaling.maxReplicas"
    "min_contexts" "context.autoscaling.minReplicas" "max_contexts" "context.autoscaling.maxReplicas"
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
{{- range $tower := list "context" "denoiser" -}}
{{- $bounds := fromYaml (include "twotower.bounds" (list $root $tower)) -}}
{{- $_ := set $settings (printf "min_%ss" $tower) $bounds.least -}}
{{- $_ := set $settings (printf "max_%ss" $tower) $bounds.most -}}
{{- end -}}
{{- if not (or $root.Values.denoiser.enabled (hasKey $settings "ar_fallback")) -}}
{{- $_ := set $settings "ar_fallback" true -}}
{{- end -}}
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

{{/*
(root, tower): between which numbers the gateway's decision lies. They are the autoscaler's own; without one, what is wanted is what
there should be.
*/}}
{{- define "twotower.bounds" -}}
{{- $root := index . 0 -}}
{{- $role := index $root.Values (index . 1) -}}
{{- if not (dig "enabled" true $role) -}}
least: 0
most: 1
{{- else if eq $root.Values.autoscaling.kind "none" -}}
least: {{ $role.replicas }}
most: {{ max 1 (int $role.replicas) }}
{{- else -}}
least: {{ $role.autoscaling.minReplicas }}
most: {{ $role.autoscaling.maxReplicas }}
{{- end -}}
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
