"""What RouteT2I printed (COCO 2014, large member SD3, small member SD2.1): the figures that stand beside ours."""

from __future__ import annotations

METRICS = (
    "definition", "detail", "clarity", "sharpness", "harmony", "realism", "color", "consistency", "layout", "integrity",
)  # fmt: skip
SMALL = (0.6251, 0.6685, 0.6076, 0.6537, 0.5949, 0.5575, 0.4680, 0.5088, 0.4860, 0.4690)
LARGE = (0.6337, 0.6847, 0.6346, 0.6703, 0.5930, 0.5868, 0.5134, 0.5199, 0.5345, 0.4972)

# At a budget of 50 %: our name of the router -> the ten means and dP.
TABLE: dict[str, tuple[tuple[float, ...], float]] = {
    "random": ((0.6294, 0.6766, 0.6211, 0.6620, 0.5939, 0.5721, 0.4907, 0.5144, 0.5102, 0.4831), 40.00),
    "routellm-bert": ((0.6347, 0.6792, 0.6305, 0.6651, 0.5960, 0.5788, 0.4982, 0.5160, 0.5167, 0.4866), 71.51),
    "routellm-mf": ((0.6364, 0.6814, 0.6299, 0.6660, 0.5952, 0.5776, 0.4970, 0.5164, 0.5149, 0.4850), 69.90),
    "hybrid-llm": ((0.6327, 0.6784, 0.6306, 0.6677, 0.5964, 0.5787, 0.5008, 0.5161, 0.5191, 0.4864), 73.49),
    "zooter": ((0.6350, 0.6796, 0.6315, 0.6672, 0.5966, 0.5788, 0.5004, 0.5166, 0.5179, 0.4854), 77.95),
    "token": ((0.6350, 0.6786, 0.6318, 0.6679, 0.5975, 0.5804, 0.5010, 0.5167, 0.5189, 0.4865), 83.97),
}
TARGETS = (40, 50, 60, 70, 80)
# Cost saving in per cent at those dP.
SAVINGS = {
    "routellm-bert": (56.15, 51.39, 46.92, 42.70, 40.21),
    "routellm-mf": (48.86, 49.90, 48.20, 44.89, 41.50),
    "hybrid-llm": (62.06, 58.85, 53.63, 49.92, 33.38),
    "zooter": (69.28, 65.76, 60.81, 57.35, 49.64),
    "token": (71.81, 70.24, 66.61, 60.01, 53.53),
}
