"""What a setting is, what it may be, and how YAML files and flags become one checked configuration."""

from d1jax.config.errors import CannotSave as CannotSave
from d1jax.config.errors import ConfigError as ConfigError
from d1jax.config.errors import Diverged as Diverged
from d1jax.config.errors import Stopped as Stopped
from d1jax.config.schema import ADAPTIVE as ADAPTIVE
from d1jax.config.schema import Alignment as Alignment
from d1jax.config.schema import Config as Config
from d1jax.config.schema import EstimatorConfig as EstimatorConfig
from d1jax.config.schema import EvaluationConfig as EvaluationConfig
from d1jax.config.schema import GuardConfig as GuardConfig
from d1jax.config.schema import LoraConfig as LoraConfig
from d1jax.config.schema import MeshConfig as MeshConfig
from d1jax.config.schema import ModelConfig as ModelConfig
from d1jax.config.schema import OptimizerConfig as OptimizerConfig
from d1jax.config.schema import RlConfig as RlConfig
from d1jax.config.schema import SamplerConfig as SamplerConfig
from d1jax.config.schema import SftConfig as SftConfig
from d1jax.config.schema import TaskConfig as TaskConfig
