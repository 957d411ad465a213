from jit_accel.base.errors import UserError as UserError
from jit_accel.config.settings import Config as Config
from jit_accel.data.batches.ready_batches import batches as batches
from jit_accel.data.formats.sources import open_images as open_images
from jit_accel.evaluate import measure as measure
from jit_accel.model.generation import generate as generate
from jit_accel.model.loading import load_pipeline
from jit_accel.model.objective import Objective as Objective
from jit_accel.model.pipeline import JiTPipeline as JiTPipeline
from jit_accel.model.scheduler import JiTScheduler as JiTScheduler
from jit_accel.model.transformer import JiTTransformer2DModel as JiTTransformer2DModel
from jit_accel.train import fit as fit

__version__: str
load = load_pipeline
