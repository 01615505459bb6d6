{{- define "cachefs.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "cachefs.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* What selects the pods of a component. Takes a list of the context and the component. */}}
{{- define "cachefs.selector" -}}
app.kubernetes.io/name: cachefs
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "cachefs.labels" -}}
app.kubernetes.io/name: cachefs
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{/* The name of the volume and the claim that the chart makes. */}}
{{- define "cachefs.store" -}}
{{ include "cachefs.fullname" . }}-store
{{- end -}}

{{/* Which of the three kinds of share the values name: nfs, existingClaim or hostPath. */}}
{{- define "cachefs.storeKind" -}}
{{- $kinds := list -}}
{{- if .Values.store.existingClaim }}{{ $kinds = append $kinds "existingClaim" }}{{ end -}}
{{- if .Values.store.hostPath }}{{ $kinds = append $kinds "hostPath" }}{{ end -}}
{{- if gt (len $kinds) 1 }}{{ fail "store.existingClaim and store.hostPath are both set: name one share" }}{{ end -}}
{{- if $kinds -}}
{{ first $kinds }}
{{- else -}}
{{- $nfs := .Values.store.nfs | default dict -}}
{{- if not (and $nfs.server $nfs.path) }}{{ fail "no share is named: set store.nfs.server and store.nfs.path, store.existingClaim or store.hostPath" }}{{ end -}}
nfs
{{- end -}}
{{- end -}}

{{/* The address of the coordinator within the cluster. */}}
{{- define "cachefs.address" -}}
https://{{ include "cachefs.fullname" . }}-coordinator.{{ .Release.Namespace }}.svc:{{ .Values.coordinator.service.port }}
{{- end -}}
