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

{{/* The kinds of pods that run the agent: one on nodes of their own, two in a cluster that several hosts share. What
     depends on the kind stands below `kind`, and what does not is as it is elsewhere. */}}
{{- define "chutes-miner.kinds" -}}
{{- if .Values.cluster.shared }}
- {suffix: -members, component: member, member: true, host: {{ and .Values.host.enabled .Values.coordinator.chutes }}}
{{- if .Values.host.enabled }}
- {suffix: -hosts, component: host, member: false, host: true}
{{- end }}
{{- else }}
- {suffix: "", component: "", member: {{ .Values.coordinator.enabled }}, host: {{ .Values.host.enabled }}}
{{- end }}
{{- end }}

{{- define "chutes-miner.pod" -}}
{{ include "chutes-miner.name" . }}{{ .kind.suffix }}
{{- end }}

{{/* Labels by which the pods of one kind are found. They never change. */}}
{{- define "chutes-miner.kind-selector" -}}
{{ include "chutes-miner.selector" . }}
{{- with .kind.component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* The ConfigMap that says which cluster there is, and for whom the tokens are made that are shown to it. */}}
{{- define "chutes-miner.notice" -}}
{{ include "chutes-miner.name" . }}-cluster
{{- end }}
{{- define "chutes-miner.audience" -}}
chutes-miner:{{ .Values.miner.hotkey }}:{{ .Release.Namespace }}/{{ include "chutes-miner.name" . }}
{{- end }}

{{/* What a shared cluster needs, and what has no meaning there. */}}
{{- define "chutes-miner.check-shared" -}}
{{- $values := .Values }}
{{- if $values.cluster.shared }}
{{- if not $values.miner.hotkey }}{{ fail "cluster.shared: miner.hotkey is missing, the SS58 address that you mine with" }}{{ end }}
{{- if not $values.miner.seedSecret }}{{ fail "cluster.shared: miner.seedSecret is missing, a Secret with the seed for the members" }}{{ end }}
{{- if or $values.cluster.found $values.cluster.tokenSecret }}{{ fail "cluster.shared: nodes enter by themselves, so that cluster.found and cluster.tokenSecret must be left empty" }}{{ end }}
{{- if or $values.coordinator.advertise $values.host.address }}{{ fail "cluster.shared: each node is reached at its own address, so that coordinator.advertise and host.address must be left empty" }}{{ end }}
{{- $guarded := false }}
{{- range $label, $value := $values.coordinator.nodeSelector }}
{{- if hasPrefix "node-restriction.kubernetes.io/" $label }}{{ $guarded = true }}{{ end }}
{{- end }}
{{- if not $guarded }}{{ fail "cluster.shared: coordinator.nodeSelector needs a label that begins with node-restriction.kubernetes.io/, which a node cannot give to itself: the nodes with it get the seed" }}{{ end }}
{{- end }}
{{- end }}

{{- define "chutes-miner.image" -}}
{{- with .Values.image }}{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}{{ end }}
{{- end }}

{{/* Something where the pods of this kind get the seed: in a shared cluster those of members only. */}}
{{- define "chutes-miner.has-seed" -}}
{{- if or .kind.member (not .Values.cluster.shared) }}{{ .Values.miner.seedSecret }}{{ end }}
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
  {{- if .kind.host }}
  - name: CHUTES_AGENT__HOST__METRICS_LISTEN
    value: $(NODE_ADDRESS):{{ int .Values.metrics.hostPort }}
  {{- end }}
  {{- if .kind.member }}
  - name: CHUTES_AGENT__COORDINATOR__METRICS_LISTEN
    value: $(NODE_ADDRESS):{{ int .Values.metrics.memberPort }}
  {{- end }}
  {{- end }}
  {{- if and (eq .Values.proof.backend "cuda") (or .kind.host (not .Values.cluster.shared)) }}
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
    add: [DAC_OVERRIDE, FOWNER, KILL{{ if and .kind.host (or .Values.packetFilter.enabled .Values.packetFilter.remove) }}, NET_ADMIN{{ end }}, SETGID, SETUID]
volumeMounts:
  # With the name it makes the host's identity: nodes of different clusters may have the same name.
  - {name: machine-id, mountPath: /etc/machine-id, readOnly: true}
  - {name: config, mountPath: /etc/chutes-agent/config, readOnly: true}
  - {name: data, mountPath: /var/lib/chutes-agent}
  - {name: cache, mountPath: {{ .Values.cache.directory }}}
  - {name: tmp, mountPath: /tmp}
  {{- if include "chutes-miner.has-seed" . }}
  - {name: seed, mountPath: /etc/chutes-agent/seed, readOnly: true}
  {{- end }}
{{- end }}
