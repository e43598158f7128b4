{{/* What things are called, and the labels they carry. */}}

{{- define "twotower.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "twotower.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "twotower.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "twotower.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "twotower.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "twotower.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* (root, component): what selects the pods of a role. It never changes within a release. */}}
{{- define "twotower.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "twotower.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* (root, component): labels of an object. */}}
{{- define "twotower.labels" -}}
{{- $root := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
{{ include "twotower.selectorLabels" . }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* (root, component, name): an object's metadata. */}}
{{- define "twotower.metadata" -}}
{{- $root := index . 0 -}}
name: {{ index . 2 }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "twotower.labels" (list $root (index . 1)) | nindent 2 }}
{{- with $root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* (root, role's values): the image of a service. */}}
{{- define "twotower.image" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $own := default dict $role.image -}}
{{- $repository := default $root.Values.image.repository $own.repository -}}
{{- $digest := default $root.Values.image.digest $own.digest -}}
{{- $variant := ternary "cuda" "cpu" (gt (int (dig "gpu" "count" 0 $role)) 0) -}}
{{- $tag := coalesce $own.tag $root.Values.image.tag (printf "%s-%s" $root.Chart.AppVersion $variant) -}}
{{- if $digest -}}{{ printf "%s@%s" $repository $digest }}{{- else -}}{{ printf "%s:%s" $repository $tag }}{{- end -}}
{{- end -}}
