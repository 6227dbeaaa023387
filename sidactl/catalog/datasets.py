"""Datasets that prepare-data knows, and the VAE of those of latents."""

from collections.abc import Mapping

from sidactl.catalog.entries import SEE_PUBLISHER, Dataset, Download, Entry
from sidactl.catalog.generators import SIDA_ROOT

DATASETS: Mapping[str, Dataset] = {
    entry.name: entry
    for entry in (
        Dataset(
            name="tiny-digits",
            about="1,797 handwritten digits of 8x8 pixels (UCI optdigits, test part)",
            licence="CC BY 4.0: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998)",
            detector="tiny-digits",
            builtin=True,
            shape=(8, 1, 10),
        ),
        Dataset(
            name="cifar10",
            about="50,000 images of 32x32 pixels in 10 classes: cifar-10-python.tar.gz",
            num_images=50_000,
            shape=(32, 3, 10),
            licence="none stated: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009)",
            source=Download(
                url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                size_bytes=170_498_071,
            ),
            where="https://www.cs.toronto.edu/~kriz/cifar.html",
        ),
        Dataset(
            name="imagenet64",
            about="1,281,167 images in 1,000 classes, cut to 64x64: ILSVRC/Data/CLS-LOC/train",
            num_images=1_281_167,
            licence="for research and teaching, on the terms of image-net.org",
            where="https://image-net.org/download.php",
        ),
        Dataset(
            name="ffhq64",
            about="70,000 faces, scaled to 64x64: images1024x1024",
            num_images=70_000,
            licence="CC BY-NC-SA 4.0, single images under their own",
            where="https://github.com/NVlabs/ffhq-dataset",
        ),
        Dataset(
            name="afhqv2-64",
            about="15,803 faces of animals, scaled to 64x64: afhqv2",
            num_images=15_803,
            licence="CC BY-NC 4.0",
            where="https://github.com/clovaai/stargan-v2",
        ),
        Dataset(
            name="imagenet512",
            about="1,281,167 images in 1,000 classes, cut to 512x512: ILSVRC/Data/CLS-LOC/train",
            num_images=1_281_167,
            is_latent=True,
            licence="for research and teaching, on the terms of image-net.org",
            where="https://image-net.org/download.php",
        ),
        Dataset(
            name="imagenet512-labels",
            about="the classes of the 1,281,167 images of imagenet512, without images: all that mode sid needs",
            licence=SEE_PUBLISHER,
            source=Download(url=f"{SIDA_ROOT}/EDM2_distillation/dataset.json"),
            num_images=1_281_167,
            shape=(None, None, 1000),
            labels_of="imagenet512",
            where="https://huggingface.co/UT-Austin-PML/SiDA",
        ),
        Dataset(
            name="fashion32",
            about="60,000 grey images of clothing in 10 classes, padded to 32x32: Fashion-MNIST, training part",
            num_images=60_000,
            licence="MIT",
            where="https://github.com/zalandoresearch/fashion-mnist",
        ),
    )
}

VAE_NAME = "stabilityai/sd-vae-ft-mse"
"""the VAE that latents are encoded and decoded with unless another is named; of all in the hub by OWNER/NAME"""

VAE_CONFIG, VAE_WEIGHTS = VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")

LATENT_CHANNELS, LATENT_SCALE = 4, 8
"""channels of a latent, and pixels a side of which one of its values stands"""


def vae_url(name: str, file: str) -> str:
    """Where the hub has a file of the VAE OWNER/NAME."""
    return f"https://huggingface.co/{name}/resolve/main/{file}"


VAES: Mapping[str, Entry] = {
    VAE_NAME: Entry(
        name=VAE_NAME,
        about="the VAE of Stable Diffusion, about 335 MB, for the latents of ImageNet 512; --vae takes others",
        licence="MIT",
        source=Download(url=vae_url(VAE_NAME, VAE_WEIGHTS)),
    )
}
