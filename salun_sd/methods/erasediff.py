"""EraseDiff (arXiv 2401.05779, version 4, section 3): retain, under the constraint that the forget loss falls."""

from dataclasses import dataclass

from salun_sd.methods.salun import SalUn


@dataclass(frozen=True)
class EraseDiff(SalUn):
    """min R(theta) over theta with q(theta) = U(theta) - min_phi U(phi) <= 0. Each step gives Adam

        g = grad R + s grad q,  s = max(0, (eta |grad q|^2 - grad q . grad R) / |grad q|^2),

    the direction nearest to grad R with g . grad q >= eta |grad q|^2. U is SalUn's loss ||e(x_t|c') - e(x_t|c)||^2, and
    R the weighted retain term: the paper's is the denoising loss, weight 1, retain target "noise".

    The paper approximates min_phi U(phi) by K gradient steps on U from theta, and takes its value as a number: no
    gradient flows through it, so grad q = grad U, and g depends on gradients alone. The K steps would change no bit of
    the result, and are not taken. Without images to retain, the loss is U alone.

    Other than the authors' script (JingWu321/EraseDiff, 14f4e98: sd/train_scripts/erasediff_nsfw.py), which has a fixed
    s = 0.1, takes the pseudo prompt from another data set and trains on one first batch again and again: s follows the
    equation, c' is the anchor, and the batches go through all images. Its choice for a computed s,
    eta - cos(grad q, grad R), is not the paper's. eta 0.1 is the default of the authors' ddpm/main.py.
    """

    support = "not-cross-attention"
    published = {
        "lr": 1e-5, "steps": None, "batch_size": 8, "samples": 800, "retain_weight": 1.0, "retain_target": "noise",
    }  # fmt: skip

    eta: float = 0.1

    def join(self, ff: float, fr: float) -> float:
        """s: a rule of methods.surgery, of grad U and grad R."""
        return max(0.0, self.eta - fr / ff) if ff else self.eta
