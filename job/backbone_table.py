"""One row per keras.applications classifier with a no-top form: plain records, nothing imported.

Layer and file names were read out of Keras 3.15's sources; ``tests/models/test_backbones.py`` holds them against the
installed Keras.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BackboneRow:
    """What the job knows about one backbone.

    Attributes:
        name: Constructor in keras.applications, and the value of ``TRANSFER_BACKBONE``.
        module: keras.applications submodule that holds its ``preprocess_input``.
        fine_tune_from: Default first layer that trains in fine_tune: the start of the last stage, or of about the
            last third. Always a layer that Keras names itself, never an automatically numbered one.
        minimum_size: Smallest square input in pixels.
        weights_file: Name of the no-top ImageNet file in Keras's cache; ``{size}`` stands for the size in pixels of
            the images the weights were trained on, where there is one file for each.
        weight_sizes: Sizes in pixels for which Keras has own weights, ascending; for any other size it loads the
            largest. Empty where one file serves all sizes.
    """

    name: str
    module: str
    fine_tune_from: str
    minimum_size: int
    weights_file: str
    weight_sizes: tuple[int, ...] = ()

    def weights_size(self, image_size: int) -> int | None:
        """Return the size in pixels whose ImageNet weights Keras loads for ``image_size``; None if all share one."""
        if not self.weight_sizes:
            return None
        return image_size if image_size in self.weight_sizes else self.weight_sizes[-1]

    def weights_file_name(self, image_size: int) -> str:
        """Return the name of the no-top ImageNet file that Keras loads for ``image_size`` pixels."""
        return self.weights_file.format(size=self.weights_size(image_size))


def _vgg(depth: int) -> BackboneRow:
    name = f"VGG{depth}"
    return BackboneRow(
        name, name.lower(), "block5_conv1", 32, f"{name.lower()}_weights_tf_dim_ordering_tf_kernels_notop.h5"
    )


def _resnet(depth: int) -> BackboneRow:
    file_name = f"resnet{depth}_weights_tf_dim_ordering_tf_kernels_notop.h5"
    return BackboneRow(f"ResNet{depth}", "resnet", "conv5_block1_1_conv", 32, file_name)


def _resnet_v2(depth: int) -> BackboneRow:
    file_name = f"resnet{depth}v2_weights_tf_dim_ordering_tf_kernels_notop.h5"
    return BackboneRow(f"ResNet{depth}V2", "resnet_v2", "conv5_block1_preact_bn", 32, file_name)


def _densenet(depth: int) -> BackboneRow:
    file_name = f"densenet{depth}_weights_tf_dim_ordering_tf_kernels_notop.h5"
    return BackboneRow(f"DenseNet{depth}", "densenet", "conv5_block1_0_bn", 32, file_name)


def _efficientnet(letter: str) -> BackboneRow:
    file_name = f"efficientnet{letter.lower()}_notop.h5"
    return BackboneRow(f"EfficientNet{letter}", "efficientnet", "block6a_expand_conv", 32, file_name)


def _efficientnet_v2(letter: str) -> BackboneRow:
    file_name = f"efficientnetv2-{letter.lower()}_notop.h5"
    return BackboneRow(f"EfficientNetV2{letter}", "efficientnet_v2", "block6a_expand_conv", 32, file_name)


def _convnext(size: str) -> BackboneRow:
    prefix = f"convnext_{size.lower()}"
    return BackboneRow(f"ConvNeXt{size}", "convnext", f"{prefix}_downsampling_block_2", 32, f"{prefix}_notop.h5")


_ROWS = (
    BackboneRow(
        "Xception",
        "xception",
        "block11_sepconv1_act",
        71,
        "xception_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    *(_vgg(depth) for depth in (16, 19)),
    *(_resnet(depth) for depth in (50, 101, 152)),
    *(_resnet_v2(depth) for depth in (50, 101, 152)),
    BackboneRow(
        "InceptionV3", "inception_v3", "mixed7", 75, "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"
    ),
    BackboneRow(
        "InceptionResNetV2",
        "inception_resnet_v2",
        "mixed_7a",
        75,
        "inception_resnet_v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    BackboneRow("MobileNet", "mobilenet", "conv_pad_12", 32, "mobilenet_1_0_{size}_tf_no_top.h5", (128, 160, 192, 224)),
    BackboneRow(
        "MobileNetV2",
        "mobilenet_v2",
        "block_11_expand_BN",
        32,
        "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_{size}_no_top.h5",
        (96, 128, 160, 192, 224),
    ),
    BackboneRow(
        "MobileNetV3Small",
        "mobilenet_v3",
        "expanded_conv_8_expand",
        32,
        "weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5",
    ),
    BackboneRow(
        "MobileNetV3Large",
        "mobilenet_v3",
        "expanded_conv_12_expand",
        32,
        "weights_mobilenet_v3_large_224_1.0_float_no_top_v2.h5",
    ),
    *(_densenet(depth) for depth in (121, 169, 201)),
    BackboneRow("NASNetMobile", "nasnet", "reduction_conv_1_reduce_8", 32, "nasnet_mobile_no_top.h5"),
    BackboneRow("NASNetLarge", "nasnet", "reduction_conv_1_reduce_12", 32, "nasnet_large_no_top.h5"),
    *(_efficientnet(f"B{number}") for number in range(8)),
    *(_efficientnet_v2(letter) for letter in ("B0", "B1", "B2", "B3", "S", "M", "L")),
    *(_convnext(size) for size in ("Tiny", "Small", "Base", "Large", "XLarge")),
)

BACKBONES: dict[str, BackboneRow] = {row.name: row for row in _ROWS}
"""Every accepted value of ``TRANSFER_BACKBONE`` with its row."""
