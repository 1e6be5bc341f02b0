import warnings

__version__ = "0.2.0"
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)  # fastai uses it
