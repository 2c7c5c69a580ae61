{{/* The application's arguments: the values' `config`, with the pool and the ledger filled in. */}}
{{- define "shoal.args" -}}
{{- $args := deepCopy .Values.config -}}
{{- if ne .Values.pool.source "image" -}}
{{- $_ := set $args "pool" .Values.pool.mountPath -}}
{{- else if .Values.pool.path -}}
{{- $_ := set $args "pool" .Values.pool.path -}}
{{- end -}}
{{- $ledger := deepCopy (default (dict) $args.ledger) -}}
{{- if .Values.postgresql.host -}}
{{- with .Values.postgresql -}}
{{- $_ := set $ledger "url" (printf "postgresql://%s@%s:%d/%s" .user .host (int .port) .database) -}}
{{- end -}}
{{- else if not $ledger.url -}}
{{- $_ := set $ledger "url" "sqlite:////tmp/shoal.db" -}}
{{- end -}}
{{- $_ := set $args "ledger" $ledger -}}
{{- toYaml $args -}}
{{- end -}}

{{/* What the schema cannot say: values that contradict each other. */}}
{{- define "shoal.check" -}}
{{- $workers := 0 -}}
{{- range .Values.workerGroups -}}
{{- $workers = add $workers (int (default .replicas .maxReplicas)) -}}
{{- end -}}
{{- $ingress := default (dict) .Values.config.ingress -}}
{{- $ledger := default (dict) .Values.config.ledger -}}
{{- if not .Values.postgresql.host -}}
{{- if or (gt $workers 1) (gt (int (default 1 $ingress.max_replicas)) 1) -}}
{{- fail "postgresql.host: needed, since several pods or ingress replicas cannot share an SQLite ledger" -}}
{{- end -}}
{{- if .Values.keys.secretName -}}
{{- fail "keys.secretName: needs postgresql.host; an SQLite ledger lives inside the worker" -}}
{{- end -}}
{{- else -}}
{{- if $ledger.url -}}
{{- fail "config.ledger.url: leave it out, it is built from postgresql" -}}
{{- end -}}
{{- if not .Values.postgresql.secretName -}}
{{- fail "postgresql.secretName: name the secret that holds the password" -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.pool.source "pvc") (not .Values.pool.pvc.claimName) -}}
{{- fail "pool.pvc.claimName: name the claim that holds the pool" -}}
{{- end -}}
{{- if and (eq .Values.pool.source "objectStore") (not .Values.pool.objectStore.remote) -}}
{{- fail "pool.objectStore.remote: say where the pool is" -}}
{{- end -}}
{{- if eq .Values.upgrade.strategy "NewClusterWithIncrementalUpgrade" -}}
{{- if not .Values.upgrade.gatewayClassName -}}
{{- fail "upgrade.gatewayClassName: NewClusterWithIncrementalUpgrade moves traffic through a Gateway" -}}
{{- end -}}
{{- if not .Values.autoscaling.enabled -}}
{{- fail "autoscaling.enabled: NewClusterWithIncrementalUpgrade needs it" -}}
{{- end -}}
{{- end -}}
{{- range .Values.workerGroups -}}
{{- $least := default .replicas .minReplicas -}}
{{- $most := default .replicas .maxReplicas -}}
{{- if or (gt (int $least) (int .replicas)) (lt (int $most) (int .replicas)) -}}
{{- fail (printf "workerGroups.%s: minReplicas <= replicas <= maxReplicas does not hold" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
