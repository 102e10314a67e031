// A mixin: vllm:num_requests_running.
local config = import 'config.libsonnet';

{
  prometheusAlerts+:: {
    groups+: [{
      name: 'serving',
      rules: [{ alert: 'Running', expr: 'sum(vllm:num_requests_running{%(selector)s}) > 10' % config }],
    }],
  },
}
