"""Hold a model: its public shape, its weights, its tokenizer, and the plaintext pass over a context.

shape         what is public about a model
families      what each architecture reads from its config.json, and how it names its tensors: one table
tensor_files  the tensors of a folder
folding       norms, scales and means folded into matrices, so that every family runs one program
weights       the matrices that come out
tokenizer     text to token ids and back
loading       all of these from a Hugging Face folder
rope          rotary positions
prefill       the pass over the owner's context, on CPU or GPU
shapes/       config.json files of well-known models, to price them without their weights
"""

from mpcache.model.loading import Model, demo_model_dir, load_model, load_shape, load_tokenizer
from mpcache.model.shape import ModelShape, RopeScaling
from mpcache.model.weights import LayerWeights, Weights

__all__ = [
    "LayerWeights",
    "Model",
    "ModelShape",
    "RopeScaling",
    "Weights",
    "demo_model_dir",
    "load_model",
    "load_shape",
    "load_tokenizer",
]
