"""Turn a decoder LLM into a text embedder and put it to work, on Ray from end to end (ULLME, arXiv 2408.03402).

Importing the package loads neither torch nor ray.
"""

from ullme_ray.errors import UllmeError
from ullme_ray.spec import JobSpec, load_job

__version__ = "0.1.0"
__all__ = ["JobSpec", "UllmeError", "__version__", "load_job"]
