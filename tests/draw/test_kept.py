import hashlib

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.model import POCKET
from salun_sd.draw.kept import called, key_of


def test_a_base_is_called_the_same_by_whoever_uses_it(tiny, tmp_path):
    for name in ("mine", "yours"):
        (tmp_path / name).symlink_to(POCKET)
    mine, yours, pocket = (find(str(name)) for name in (tmp_path / "mine", tmp_path / "yours", "pocket"))
    assert called(mine) == called(yours) != called(find(tiny))
    assert called(pocket).startswith("pocket ") and all(pocket.fingerprint[:8] in called(m) for m in (mine, pocket))


def test_images_in_half_are_kept_apart_and_those_of_float32_where_they_were(tiny):
    base = find(tiny)
    keys = [key_of(base, "DDIMScheduler", 2, *dtype) for dtype in ((), ("float32",), ("bfloat16",), ("float16",))]
    assert keys[0] == keys[1] == hashlib.sha256(f"{base.identity} DDIMScheduler 2".encode()).hexdigest()[:16]
    assert len(set(keys)) == 3
