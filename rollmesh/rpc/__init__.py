"""gRPC as the mesh uses it.

* `channel`, `server`: the one way to open and to serve; equal limits on both sides.
* `status_codes`, `interceptor`: errors of the mesh as statuses and back; what every handler is wrapped in.
* `retry`, `multiplex`: bounded retries of unary calls; many calls over one stream.
* `coordinator_client`, `rollout_client`, `membership`: typed clients that take and give `rollmesh.types` only.
"""
