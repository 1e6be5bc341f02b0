"A stand-in for an autoencoder whose latents have no places, such as the one that lesson 10 and lab 1 define"
from diffusers.configuration_utils import register_to_config
from torch import nn
from latentdiff.autoencoder import Autoencoder

class Flat(Autoencoder):
    "One fully connected layer to `latent_dim` numbers, and one back"
    @register_to_config
    def __init__(self, size=16, latent_dim=7, latent_mean=None, latent_std=None):
        super().__init__(latent_dim, latent_mean, latent_std)
        self.encoder, self.decoder = nn.Linear(3*size*size, latent_dim), nn.Linear(latent_dim, 3*size*size)
    def encode_raw(self, images): return self.encoder(images.flatten(1)), None
    def decode_raw(self, z): return self.decoder(z).unflatten(1, (3, self.config.size, self.config.size))
    def latent_shape(self, size): return (self.latent_channels,)
