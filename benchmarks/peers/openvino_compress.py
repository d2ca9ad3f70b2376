"""A GGUF file as an OpenVINO network with int8 weights. Run by the Python of OpenVINO's environment, which has `nncf`.

openvino_compress.py GGUF DIRECTORY: the directory is made. A copy of the file is read, because the reader writes its
network beside the file that it reads.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import nncf
import openvino
import openvino_genai

NETWORK = "openvino_model.xml"


def main() -> None:
    source, directory = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        copy = Path(temporary) / source.name
        shutil.copy(source, copy)
        config = openvino_genai.SchedulerConfig()
        config.cache_size = 1
        openvino_genai.ContinuousBatchingPipeline(str(copy), config, "CPU", {"enable_save_ov_model": True})
        network = openvino.Core().read_model(copy.with_name(NETWORK))
        compressed = nncf.compress_weights(network, mode=nncf.CompressWeightsMode.INT8_ASYM)
        directory.mkdir()
        openvino.save_model(compressed, directory / NETWORK, compress_to_fp16=False)


if __name__ == "__main__":
    main()
