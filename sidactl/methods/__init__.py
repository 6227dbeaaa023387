"""What the methods descend: their losses, a file for each paper and for what they share. No step, no optimiser."""

from sidactl.methods.discriminator import discriminator_loss
from sidactl.methods.score_losses import fake_score_loss
from sidactl.methods.sid import adversarial_generator_loss, sid_generator_loss

__all__ = ["adversarial_generator_loss", "discriminator_loss", "fake_score_loss", "sid_generator_loss"]
