"""RollMesh: reinforcement learning for language models as an asynchronous mesh of services that speak gRPC."""

__version__ = "0.1.0"
