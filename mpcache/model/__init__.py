"""Hold a model: its public shape, its weights, its tokenizer, and the plaintext pass over a context.

shape          what is public about a model
sources        what --model names: a folder, a .gguf file, a model of the hub
hf_folder      a Hugging Face folder: config.json, tokenizer.json, chat template
families       what each architecture reads from its config.json, and how it names its tensors: one table
tensor_files   the tensors of a folder
gguf_model     a .gguf file: what each architecture reads from its metadata, the table beside `families`
gguf_header    the file's metadata, and where its tensors lie
gguf_tensors   its tensors, dequantised
gguf_tokenizer its tokenizer
folding        norms, scales and means folded into matrices, so that every family runs one program
weights        the matrices that come out
tokenizer      text to token ids and back
loading        all of these from either
rope           rotary positions
prefill        the pass over the owner's context, on CPU or GPU
shapes/        config.json files of well-known models, to price them without their weights
"""

from mpcache.model.loading import Model, demo_model_dir, load_model, load_shape, load_tokenizer
from mpcache.model.shape import ModelShape, RopeScaling
from mpcache.model.sources import find_model
from mpcache.model.weights import LayerWeights, Weights

__all__ = [
    "LayerWeights",
    "Model",
    "ModelShape",
    "RopeScaling",
    "Weights",
    "demo_model_dir",
    "find_model",
    "load_model",
    "load_shape",
    "load_tokenizer",
]
