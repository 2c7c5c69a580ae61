{{/* A Ray pod's spec. Takes the chart's scope as `root`, the group's values as `group`, a `role`
     (head or worker), and the container's `name`. */}}
{{- define "shoal.pod" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
{{- $group := .group -}}
{{- with $values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- if eq .role "worker" }}
automountServiceAccountToken: false
{{- end }}
{{- if $values.autoscaling.enabled }}
# The autoscaler (v2) replaces pods; a restarted one would be a Ray node that nobody expects.
restartPolicy: Never
{{- end }}
enableServiceLinks: false
terminationGracePeriodSeconds: {{ $values.terminationGracePeriodSeconds }}
securityContext: {{- toYaml $values.podSecurityContext | nindent 2 }}
{{- with $values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $group.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $group.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $group.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if eq $values.pool.source "objectStore" }}
initContainers:
  - name: fetch-pool
    image: {{ $values.pool.objectStore.image }}
    args: [copy, --retries=5, {{ $values.pool.objectStore.remote | quote }}, {{ $values.pool.mountPath }}]
    env:
      - {name: HOME, value: /tmp}
      - {name: RCLONE_CONFIG, value: /tmp/rclone.conf}
    {{- with $values.pool.objectStore.secretName }}
    envFrom:
      - secretRef: {name: {{ . }}}
    {{- end }}
    securityContext: {{- toYaml $values.securityContext | nindent 6 }}
    resources:
      requests: {cpu: 500m, memory: 512Mi}
      limits: {memory: 1Gi}
    volumeMounts:
      - {name: pool, mountPath: {{ $values.pool.mountPath }}}
      - {name: tmp, mountPath: /tmp}
{{- end }}
containers:
  - name: {{ .name }}
    image: {{ include "shoal.image" $root }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    securityContext: {{- toYaml $values.securityContext | nindent 6 }}
    env: {{- include "shoal.env" $root | nindent 6 }}
    {{- with $values.envFrom }}
    envFrom: {{- toYaml . | nindent 6 }}
    {{- end }}
    ports:
      - {name: serve, containerPort: 8000}
      - {name: metrics, containerPort: 8080}
      {{- if eq .role "head" }}
      - {name: gcs-server, containerPort: 6379}
      - {name: dashboard, containerPort: 8265}
      {{- end }}
    resources:
      requests: {{- include "shoal.resources" $group | nindent 8 }}
      limits: {{- include "shoal.resources" $group | nindent 8 }}
    {{- include "shoal.probes" . | nindent 4 }}
    lifecycle:
      preStop:
        # Ray ends at SIGTERM. Before it comes no new requests do, and what runs is answered.
        exec: {command: [sleep, {{ min 30 (div $values.terminationGracePeriodSeconds 2) | quote }}]}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      {{- if ne $values.pool.source "image" }}
      - name: pool
        mountPath: {{ $values.pool.mountPath }}
        readOnly: true
        {{- if and (eq $values.pool.source "pvc") $values.pool.pvc.subPath }}
        subPath: {{ $values.pool.pvc.subPath }}
        {{- end }}
      {{- end }}
      {{- if eq .role "head" }}
      - {name: config, mountPath: /etc/shoal, readOnly: true}
      {{- end }}
volumes:
  - name: tmp
    emptyDir: {}
  {{- if eq .role "head" }}
  - name: config
    configMap: {name: {{ include "shoal.fullname" $root }}-config}
  {{- end }}
  {{- if eq $values.pool.source "pvc" }}
  - name: pool
    persistentVolumeClaim: {claimName: {{ $values.pool.pvc.claimName }}, readOnly: true}
  {{- else if eq $values.pool.source "objectStore" }}
  - name: pool
    emptyDir: {sizeLimit: {{ $values.pool.objectStore.sizeLimit }}}
  {{- end }}
{{- end -}}

{{- define "shoal.resources" -}}
cpu: {{ .cpu | quote }}
memory: {{ .memory }}
{{- with .gpus }}
nvidia.com/gpu: {{ . }}
{{- end }}
{{- end -}}

{{/* The environment of every process of ours; secrets are referred to, never written here. */}}
{{- define "shoal.env" -}}
- {name: HOME, value: /tmp}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
- {name: RAY_SERVE_THROUGHPUT_OPTIMIZED, value: "1"}
{{- if .Values.postgresql.host }}
- {name: PGSSLMODE, value: {{ .Values.postgresql.sslMode }}}
- name: PGPASSWORD
  valueFrom:
    secretKeyRef: {name: {{ .Values.postgresql.secretName }}, key: {{ .Values.postgresql.secretKey }}}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Alive: the raylet (and on the head the GCS) answers. Ready: on a worker, so does its proxy. */}}
{{- define "shoal.probes" -}}
{{- $probes := .root.Values.probes -}}
{{- $raylet := "wget -q -T 2 -O- http://localhost:52365/api/local_raylet_healthz | grep -q success" -}}
{{- $gcs := "wget -q -T 2 -O- http://localhost:8265/api/gcs_healthz | grep -q success" -}}
{{- $proxy := "wget -q -T 2 -O- http://localhost:8000/-/healthz | grep -q success" -}}
{{- $alive := ternary (printf "%s && %s" $raylet $gcs) $raylet (eq .role "head") -}}
{{- $ready := ternary $alive (printf "%s && %s" $raylet $proxy) (eq .role "head") -}}
startupProbe:
  exec: {command: [bash, -c, {{ $alive | quote }}]}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: {{ div (int $probes.startupSeconds) (int $probes.periodSeconds) }}
livenessProbe:
  exec: {command: [bash, -c, {{ $alive | quote }}]}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: {{ $probes.failureThreshold }}
readinessProbe:
  exec: {command: [bash, -c, {{ $ready | quote }}]}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: 1
{{- end -}}
