"""The embeddings table copied into a vector store: Lance, FAISS, Qdrant or pgvector, each by its own client in one small file.

Streams the table batch by batch, so it may be larger than memory. An export is idempotent: rows go in under their id and chunk,
rows that the table no longer has go out, and a store that holds this version of the table already is left as it is.
A target that holds anything else is refused. Clients are optional and loaded where they are used; no torch, no Ray.
"""

from ullme_ray.vector_stores.export import STORES, ExportReport, run_export

__all__ = ["STORES", "ExportReport", "run_export"]
