"""The tables of a result of `pixel_aware_process.py`, one for each part."""

import report
from process_measures import DARK, HIDDEN
from process_models import RECONSTRUCTED_AT

PARTS = ("convergence", "gap", "known", "scales", "reconstruction")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def rows_of(head: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(cells)} |" for cells in body)]


def setting(result: dict) -> str:
    size, data = result["size"], result["data"]
    channels = {1: "gray", 3: "RGB"}[result["channels"]]
    return (
        f"{result['title']} {data['images']} of {data['of']} images, {channels}, {size}x{size}, values in [0.004, 1]. "
        f"Seed {result['seed']}."
    )


def table_of_convergence(result: dict) -> list[str]:
    part = result["parts"]["convergence"]
    off = max(
        abs(got - expected)
        for row in part["rows"]
        for what in ("mean", "variance")
        for got, expected in zip(row[what], row[f"expected_{what}"], strict=True)
    )
    head = ["of the process", *(f"{row['name']}: mean, variance" for row in part["rows"])]
    body = [
        [f"{fraction:g}", *(f"{number(row['mean'][k])}, {number(row['variance'][k])}" for row in part["rows"])]
        for k, fraction in enumerate(part["fractions"])
    ]
    body.append(["dark pixels' variance at the end", *(number(row["dark_variance"]) for row in part["rows"])])
    body.append(["what the darkest keep of theirs", *(number(row["darkest_keeps"]) for row in part["rows"])])
    return [
        f"{setting(result)} Mean and variance of all pixels of x_i, noise drawn (closed forms differ by at most "
        f"{number(off)}); pure noise has 0 and 1. The shipped process (floor 0.1, cubic ramp) follows the image itself "
        f"here. Dark: up to {DARK} of white, {part['dark']:.0%} of all pixels. The last row is alpha_bar_T at the "
        "darkest value: 0 for pure noise.",
        "",
        *rows_of(head, body),
    ]


def table_of_gap(result: dict) -> list[str]:
    part = result["parts"]["gap"]
    found = part["leak"]
    names = ("kl_per_pixel", "kl_per_image", "worst_pixel", "information_per_pixel", "information_per_image")
    body = [[f"{row['gamma']:g}", f"{row['floor']:g}", *(number(row[name]) for name in names)] for row in part["rows"]]
    head = ["gamma", "floor", "KL a pixel", "KL an image", "worst pixel", "information a pixel", "an image"]
    needed = {row["gamma"]: row["floor_needed"] for row in part["rows"]}
    needed = ", ".join(f"{number(value)} at gamma {gamma:g}" for gamma, value in needed.items())
    return [
        f"{setting(result)} Nats between x_T given the image and N(0, I), and of mutual information of x_0 and x_T by "
        f"the histogram of pixel values, as if pixels were independent (for an image: at most). Floor 0 is the "
        f"paper's. 0.001 nats of KL a pixel need a floor of {needed}.",
        "",
        *rows_of(head, body),
        "",
        f"Measured: a network of two hidden layers of {HIDDEN} that is given x_T alone, trained for {found['steps']} "
        f"steps on {found['fit_images']} of the images, on the {result['held_images']} others. 100 % is the error of "
        f"the mean image, {number(found['constant_mse'])}: x_T tells nothing. A better network would read no less.",
        "",
        *rows_of(
            ["gamma", "floor", "squared error of x_0 from x_T", "of the mean image's"],
            [
                [f"{row['gamma']:g}", f"{row['floor']:g}", number(row["mse"]), f"{100 * row['share']:.3g} %"]
                for row in found["rows"]
            ],
        ),
    ]


def table_of_known(result: dict) -> list[str]:
    part = result["parts"]["known"]
    times, body = part["times"], []
    for row in part["rows"]:
        cells = [row["reading"], row["source"], f"{100 * row['inaccuracy']:g} %", "yes" if row["fresh"] else "no"]
        cells.append({0: "0", 1: "V", 2: "2 V"}[int(row["multiple"])] + (" + W" if row["inaccuracy"] else ""))
        errors = row["errors"]
        cells += [f"{number(e['raw'])} ({number(e['expected'])}), {number(e['clipped'])}" for e in errors]
        body.append(cells)
    body.append(["V", *["-"] * 4, *map(number, part["variance"])])
    head = ["reading", "Z", "error of Z", "fresh noise", "theory", *(f"from i = {time}" for time in times)]
    return [
        f"{setting(result)} Algorithm 1 of the paper (T = {part['steps']}, gamma {part['gamma']:g}) on "
        f"{part['images']} of the images with the exact image scale, in float64: squared error of x_0 (expected in "
        "theory), and clipped to [0, 1]. Z is the noise of the very path, or its expectation given x_i and x_0, the "
        "best that a network could predict. Reading A: noises of eq. 3, factor of eq. 4; B: noises of eq. 2, line 9 "
        "as printed. V is the variance that fresh noise of all steps has at x_0, W that of the errors of Z; means over "
        "pixels, dominated by the brightest. "
        f"The mean image has {number(part['constant_mse'])}.",
        "",
        *rows_of(head, body),
    ]


def models_of(result: dict) -> str:
    texts = []
    for mode, model in result["models"].items():
        trained, process = model["training"], model["process"]
        time = f", trained for {trained['steps']} steps, {trained['minutes']:.0f} min" if trained else ""
        texts.append(
            f"{mode}: {(model['parameters'] + model['autoencoder_parameters']) / 1e6:.2g}M parameters{time}, "
            f"T = {process['num_train_timesteps']}, gamma {process['gamma']:g}, floor {process['floor']:g}, ramp "
            f"u^{process['ramp_power']:g}"
        )
    return "; ".join(texts)


def table_of_scales(result: dict) -> list[str]:
    body = []
    for row in result["parts"]["scales"]["rows"]:
        gives = {"scale": "x_delta", "structure": "x_0"}[row["output"]]
        cells = [row["model"], gives, f"{row['step']} of {row['steps']}"]
        for what, names in (
            ("scale", ("ssim", "mse", "correlation")),
            ("alpha_bar", ("ssim",)),
            ("clean", ("ssim", "mse")),
        ):
            cells += [f"{number(row['found'][what][name])} ({number(row['constant'][what][name])})" for name in names]
        body.append(cells)
    head = ["model", "it gives", "from i", "x_delta: SSIM", "squared error", "correlation", "alpha_bar_i: SSIM"]
    head += ["x_0: SSIM", "squared error"]
    return [
        f"{setting(result)} One call of the autoencoder on x_i, the rates following the image, {result['held_images']} "
        "images; in brackets the best constant picture, the mean over other images. x_delta = exp(-gamma x_0); of a "
        "model that gives it, x_0 = -log(x_delta) / gamma, clipped. Each model has its own process, so that the same i "
        f"is less noise on a cubic ramp than on a linear one. {models_of(result)}.",
        "",
        *rows_of(head, body),
    ]


def table_of_reconstruction(result: dict) -> list[str]:
    part, body = result["parts"]["reconstruction"], []
    steps = [f"T/{divisor}" if divisor > 1 else "T" for divisor in RECONSTRUCTED_AT]
    head = ["model", "from x_i by", *(f"i = {step}" for step in steps)]
    for row in part["rows"]:
        cells = [f"{number(error['raw'])}, {number(error['clipped'])}" for error in row["errors"]]
        body.append([row["model"], row["name"], *cells])
    return [
        f"{setting(result)} Squared error of x_0, as it comes and clipped to [0, 1] (with more passes: after each), on "
        f"{part['images']} images whose noise follows the image itself; the mean image has "
        f"{number(part['constant_mse'])}. Each model has its own process: on a cubic ramp x_i has less noise than on a "
        f"linear one, but for i = T. Algorithm 1 in reading A. {models_of(result)}.",
        "",
        *rows_of(head, body),
    ]


def table(result: dict, view: str | None = None) -> str:
    """The table of a part, or all that there are."""
    parts = [part for part in PARTS if part in result["parts"]] if view is None else [view]
    if view is not None and view not in result["parts"]:
        raise ValueError(f"view {view!r}: the result has {sorted(result['parts'])}")
    texts = []
    for part in parts:
        lines = globals()[f"table_of_{part}"](result)
        texts.append("\n".join([f"{lines[0]} {report.caption(result)}", *lines[1:]]))
    return "\n\n".join(texts)
