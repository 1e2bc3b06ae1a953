"""Published combinations of network, guide and guidance weight for generate_images.py --preset, as plain data.

EDM2 (Karras et al. 2024, arXiv 2312.02696) and autoguidance (arXiv 2406.02507): ImageNet at 512x512 (latents) and 64x64,
32 Heun steps. Averages were reconstructed after training; a file name ends with the relative width of its average.
"""

MODEL_ROOT = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"

_LAST = {"xs": "2147483", "s": "2147483", "m": "2147483", "l": "1879048", "xl": "1342177", "xxl": "0939524"}  # kimg
_LAST64 = {"s": "1073741", "m": "2147483", "l": "1073741", "xl": "0671088"}
_METRICS = {"fid": "fid", "dino": "fd_dinov2"}

# preset: (net, guide, guidance weight, published value of the metric that ends the name)
_ROWS = {}

for _size, _fid, _fid_value, _dino, _dino_value in [  # without guidance
    ("xs", "0.135", 3.53, "0.200", 103.39),
    ("s", "0.130", 2.56, "0.190", 68.64),
    ("m", "0.100", 2.25, "0.155", 58.44),
    ("l", "0.085", 2.06, "0.155", 52.25),
    ("xl", "0.085", 1.96, "0.155", 45.96),
    ("xxl", "0.070", 1.91, "0.150", 42.84),
]:
    _net = f"edm2-img512-{_size}-{_LAST[_size]}"
    _ROWS[f"edm2-img512-{_size}-fid"] = (f"{_net}-{_fid}", None, 1.0, _fid_value)
    _ROWS[f"edm2-img512-{_size}-dino"] = (f"{_net}-{_dino}", None, 1.0, _dino_value)

for _size, _std, _value in [("s", "0.075", 1.58), ("m", "0.060", 1.43), ("l", "0.040", 1.33), ("xl", "0.040", 1.33)]:
    _ROWS[f"edm2-img64-{_size}-fid"] = (f"edm2-img64-{_size}-{_LAST64[_size]}-{_std}", None, 1.0, _value)

for _size, _fid, _dino in [  # guided by the unconditional XS network with the same average: (std, weight, value)
    ("xs", ("0.045", 1.40, 2.91), ("0.150", 1.70, 79.94)),
    ("s", ("0.025", 1.40, 2.23), ("0.085", 1.90, 52.32)),
    ("m", ("0.030", 1.20, 2.01), ("0.015", 2.00, 41.98)),
    ("l", ("0.015", 1.20, 1.88), ("0.035", 1.70, 38.20)),
    ("xl", ("0.020", 1.20, 1.85), ("0.030", 1.70, 35.67)),
    ("xxl", ("0.015", 1.20, 1.81), ("0.015", 1.70, 33.09)),
]:
    for _metric, (_std, _weight, _value) in (("fid", _fid), ("dino", _dino)):
        _net, _guide = f"edm2-img512-{_size}-{_LAST[_size]}-{_std}", f"edm2-img512-xs-uncond-2147483-{_std}"
        _ROWS[f"edm2-img512-{_size}-guid-{_metric}"] = (_net, _guide, _weight, _value)

_ROWS.update({  # autoguidance: guided by a smaller network from early in its training
    "edm2-img512-s-autog-fid": ("edm2-img512-s-2147483-0.070", "edm2-img512-xs-0134217-0.125", 2.10, 1.34),
    "edm2-img512-s-autog-dino": ("edm2-img512-s-2147483-0.120", "edm2-img512-xs-0134217-0.165", 2.45, 36.67),
    "edm2-img512-xxl-autog-fid": ("edm2-img512-xxl-0939524-0.075", "edm2-img512-m-0268435-0.155", 2.05, 1.25),
    "edm2-img512-xxl-autog-dino": ("edm2-img512-xxl-0939524-0.130", "edm2-img512-m-0268435-0.205", 2.30, 24.18),
    "edm2-img512-s-uncond-autog-fid":
        ("edm2-img512-s-uncond-2147483-0.070", "edm2-img512-xs-uncond-0134217-0.110", 2.85, 3.86),
    "edm2-img512-s-uncond-autog-dino":
        ("edm2-img512-s-uncond-2147483-0.090", "edm2-img512-xs-uncond-0134217-0.125", 2.90, 90.39),
    "edm2-img64-s-autog-fid": ("edm2-img64-s-1073741-0.045", "edm2-img64-xs-0134217-0.110", 1.70, 1.01),
    "edm2-img64-s-autog-dino": ("edm2-img64-s-1073741-0.105", "edm2-img64-xs-0134217-0.175", 2.20, 31.85),
})  # fmt: skip

GENERATION_PRESETS = {
    name: dict(net=net, gnet=guide, guidance=weight, published={_METRICS[name.rsplit("-", 1)[1]]: value})
    for name, (net, guide, weight, value) in _ROWS.items()
}


def generation_preset(name, root=MODEL_ROOT):
    """{net, gnet, guidance, published} of a preset, files as `<root>/<name>.pkl`; gnet is None without guidance.

    root: URL or folder that holds the published files. Raises ValueError for an unknown name, listing the known ones.
    """
    if name not in GENERATION_PRESETS:
        raise ValueError(f"--preset={name} is unknown; known: {', '.join(GENERATION_PRESETS)}")
    row = dict(GENERATION_PRESETS[name])
    for key in ("net", "gnet"):
        row[key] = row[key] and f"{str(root).rstrip('/')}/{row[key]}.pkl"
    return row
