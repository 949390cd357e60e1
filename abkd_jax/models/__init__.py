"""Networks by name: each function here returns a flax module that maps inputs to `Outputs`."""

from flax.linen import Module

from abkd_jax.models.adapters import as_outputs, check_learner, from_nnx, split_variables
from abkd_jax.models.cached import Cached, cached
from abkd_jax.models.decoder import Decoder, decoder, num_embeddings
from abkd_jax.models.hugging_face import hugging_face, load_decoder, save_decoder
from abkd_jax.models.normalized import normalized, normalized_function
from abkd_jax.models.projected import projected, without_projections
from abkd_jax.models.resnet import resnet
from abkd_jax.models.small import cnn, mlp
