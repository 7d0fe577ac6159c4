"""gRPC as the mesh uses it.

* `channel`, `server`: the only ways to open a channel and to serve; equal limits on both sides.
* `status_codes`, `interceptor`: translate errors of the mesh to statuses and back; wrap every handler.
* `retry`, `multiplex`: bounded retries of unary calls; many calls over one stream.
* `coordinator_client`, `rollout_client`, `membership`: typed clients that take and return `rollmesh.types` only.
"""
