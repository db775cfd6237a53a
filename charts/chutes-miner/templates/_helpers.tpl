{{/* Labels of every object of the release. */}}
{{- define "chutes-miner.labels" -}}
app.kubernetes.io/name: chutes-miner
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* Labels by which the agent's pods are found. They never change. */}}
{{- define "chutes-miner.selector" -}}
app.kubernetes.io/name: chutes-miner
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "chutes-miner.name" -}}
{{- if contains "chutes-miner" .Release.Name }}{{ .Release.Name | trunc 50 }}{{ else }}{{ .Release.Name | trunc 37 }}-chutes-miner{{ end }}
{{- end }}

{{- define "chutes-miner.image" -}}
{{- with .Values.image }}{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}{{ end }}
{{- end }}

{{/* Arguments before the command. */}}
{{- define "chutes-miner.arguments" -}}
- --config
- /etc/chutes-agent/config/config.toml
{{- range $key, $value := .Values.settings }}
- --set
- {{ printf "%s=%v" $key $value | quote }}
{{- end }}
{{- end }}

{{/* What the agent and the step before it have in common. */}}
{{- define "chutes-miner.container" -}}
image: {{ include "chutes-miner.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
env:
  - name: CHUTES_AGENT__HOST__NAME
    valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
  - name: CHUTES_AGENT__RUNTIME__NODE
    valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
  - name: CHUTES_AGENT__HOST__ADDRESS
    {{- if .Values.host.address }}
    value: {{ .Values.host.address | quote }}
    {{- else }}
    valueFrom: {fieldRef: {fieldPath: status.hostIP}}
    {{- end }}
  {{- if .Values.metrics.enabled }}
  - name: NODE_ADDRESS
    valueFrom: {fieldRef: {fieldPath: status.hostIP}}
  {{- if .Values.host.enabled }}
  - name: CHUTES_AGENT__HOST__METRICS_LISTEN
    value: $(NODE_ADDRESS):{{ int .Values.metrics.hostPort }}
  {{- end }}
  {{- if .Values.coordinator.enabled }}
  - name: CHUTES_AGENT__COORDINATOR__METRICS_LISTEN
    value: $(NODE_ADDRESS):{{ int .Values.metrics.memberPort }}
  {{- end }}
  {{- end }}
  {{- if eq .Values.proof.backend "cuda" }}
  - name: NVIDIA_VISIBLE_DEVICES
    value: all
  - name: NVIDIA_DRIVER_CAPABILITIES
    value: compute,utility
  {{- end }}
securityContext:
  # Root for what it hands to others: the process with the seed becomes nobody, chutes' caches are anybody's.
  runAsUser: 0
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
    add: [DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID]
volumeMounts:
  # With the name it makes the host's identity: nodes of different clusters may have the same name.
  - {name: machine-id, mountPath: /etc/machine-id, readOnly: true}
  - {name: config, mountPath: /etc/chutes-agent/config, readOnly: true}
  - {name: data, mountPath: /var/lib/chutes-agent}
  - {name: cache, mountPath: {{ .Values.cache.directory }}}
  - {name: tmp, mountPath: /tmp}
  {{- if .Values.miner.seedSecret }}
  - {name: seed, mountPath: /etc/chutes-agent/seed, readOnly: true}
  {{- end }}
{{- end }}
