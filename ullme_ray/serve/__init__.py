"""HTTP serving on Ray Serve: OpenAI's embeddings API over the job's model."""

from ullme_ray.serve.launch import Server, build_app, preflight, start_server

__all__ = ["Server", "build_app", "preflight", "start_server"]
