"""Values that several places share: defaults of options, limits and the encoders' strides."""

MAX_PIXELS = 178_000_000
"""Images with more pixels are refused before they are decoded, about where Pillow refuses them too."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue over ImageNet, for values in 0..1."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of red, green and blue over ImageNet."""
MAX_SAMPLES = 4096
"""Most samples of a RoIAlign bin and axis; csrc/roi_align.h says why."""
BACKBONE = "resnet50"
"""The encoder where none is named."""
VIEW_SIZE = 224
"""Height and width of a view in pixels, also where the file of an encoder does not say what it was trained on."""
SCORE_THRESHOLD = 0.05
"""A detector's weaker detections are dropped when it is measured and exported."""
SHOWN_SCORE = 0.5
"""Weaker detections are left out of predictions for people."""
MAX_RESIZED = 1 << 22
"""Pixels of a resized image that the options in a detector's file may ask for; Cityscapes' are half of it."""
LOG_EVERY, LOG_POINTS = 10, 30
"""Steps between logging points, each of which waits for the GPU, and how many points a shorter run has at least."""
DATA_TIMEOUT = 300.0
"""Seconds without a finished image after which a run stops."""
DEMO_SIZE = 96
"""Height and width of a generated scene in pixels."""
DEMO_IMAGES = 2048
"""Scenes in the generated training set."""
DEMO_TEST_IMAGES = 1000
"""Held-out generated scenes."""
BACKBONE_STRIDES = {
    "resnet10_tiny": 8,
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), 32),
    **dict.fromkeys(("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"), 32),
    **dict.fromkeys(("wide_resnet50_2", "wide_resnet101_2"), 32),
}
"""The encoders' strides, known here so that a wrong name or view size is found before torch is imported."""
