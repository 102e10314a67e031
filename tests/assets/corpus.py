"""Queries that are right: the start of every mutation. They use each kind of metric, label and operator."""

from __future__ import annotations

S = '{job=~"$job", instance=~"$instance"}'
SA = '{job=~"$job", instance=~"$instance", actor_name=~"$actor_name"}'
STARTUP = "rivetkit_actor_startup_phase_duration_seconds"
TASK = "rivetkit_actor_user_task_duration_seconds"

# A recording that some of them use, as an entry of a rule file's list.
RECORDED = """\
  - record: actor_name:rivetkit_actor_active_count:sum
    expr: sum by (cluster, namespace, job, actor_name) (rivetkit_actor_active_count)
"""

CORRECT = (
    f"sum(rivetkit_actor_active_count{SA})",
    f"sum by (actor_name) (rivetkit_actor_active_peak{SA})",
    f"sum by (actor_name) (rate(rivetkit_actor_started_total{SA}[$__rate_interval]))",
    f"-sum by (reason) (rate(rivetkit_actor_stopped_total{SA}[$__rate_interval]))",
    f'sum(increase({STARTUP}_count{{phase="total", outcome="success"}}[$__range]))'
    f' / sum(increase({STARTUP}_count{{phase="total"}}[$__range]))',
    f'histogram_quantile(0.95, sum by (le, actor_name) (rate({STARTUP}_bucket{{phase="total"}}[5m])))',
    f'sum by (phase) (rate({STARTUP}_sum{{phase!="total"}}[5m]))'
    f' / sum by (phase) (rate({STARTUP}_count{{phase!="total"}}[5m]))',
    f"sum by (is_new, outcome) (rate({STARTUP}_count[5m]))",
    f"histogram_quantile(0.99, sum by (le, kind) (rate({TASK}_bucket{SA}[$__rate_interval])))",
    f'sum by (actor_name) (rate({TASK}_count{{outcome="error", kind=~"action|http"}}[5m]))'
    f" / sum by (actor_name) (rate({TASK}_count[5m]))",
    f"sum by (inbox) (rivetkit_actor_inbox_depth{SA})",
    'rivetkit_actor_keep_awake_active{kind="keep_awake"} > 0',
    "topk(10, sum by (instance) (rivetkit_actor_queue_depth))",
    f"sum(rate(rivetkit_actor_queue_messages_sent_total{SA}[5m]))"
    f" - sum(rate(rivetkit_actor_queue_messages_received_total{SA}[5m]))",
    "deriv(rivetkit_actor_queue_depth[15m]) > 0",
    'sum by (op) (rate(pegboard_actor_kv_operation_duration_seconds_count{op!="get"}[5m]))',
    f"sum(rkmetrics_kv_active_blocks{SA}) / sum(rkmetrics_kv_blocks{SA})",
    "max by (actor_name) (rkmetrics_kv_cache_usage_ratio) - min by (actor_name) (rkmetrics_kv_cache_usage_ratio)",
    "sum by (actor_name) (rate(rkmetrics_kv_prefix_cache_hits_total[5m]))"
    " / sum by (actor_name) (rate(rkmetrics_kv_prefix_cache_queries_total[5m]))",
    "max(time() - (rkmetrics_kv_last_publish_timestamp_seconds > 0))",
    'sum by (cluster, namespace, job) (rate(rkmetrics_kv_publish_total{outcome="error"}[10m])) > 0.05',
    "rkmetrics_worker_request_active_slots >= rkmetrics_worker_request_slots and rkmetrics_worker_requests_waiting > 0",
    'rkmetrics_kv_workers{state="stale"} > 0',
    f"max by (instance) (rkmetrics_series{S}) / max by (instance) (rkmetrics_series_limit{S})",
    'sum by (route, code) (rate(rkmetrics_http_requests_total{code=~"401|403"}[5m]))',
    'increase(rkmetrics_auth_failures_total{reason=~"missing|malformed"}[15m]) > 10',
    "count by (version, catalog) (rkmetrics_build_info)",
    "rkmetrics_kv_blocks * on (job, instance) group_left (version) rkmetrics_build_info",
    "actor_name:rivetkit_actor_active_count:sum > 100",
    "sum by (job) (actor_name:rivetkit_actor_active_count:sum)",
    "sum by (actor_name) (rivetkit_actor_started_total offset 1h)"
    " unless on (actor_name) sum by (actor_name) (rivetkit_actor_active_count)"
    " and on () vector(1)",
    f"sum by (instance) (process_open_fds{S}) / sum by (instance) (process_max_fds{S})",
    f"sum by (instance) (up{S})",
)
