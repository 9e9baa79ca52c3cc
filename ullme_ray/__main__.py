"""`python -m ullme_ray` is `ullme-ray`."""

from ullme_ray.cli import main

main()
