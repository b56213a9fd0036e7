"""Messages before the first step."""

import pytest

from stpp.config import Config, LabelConfig
from stpp.errors import UserError
from stpp.loading.sample import Sample
from stpp.run import preflight


def samples(*keys: str) -> list[Sample]:
    return [Sample(key=key, image=f"/data/{key}.jpg", width=8, height=8) for key in keys]


@pytest.mark.parametrize("labelled, unlabelled, val, said", [
    ("ab", "cd", "ef", []),
    ("ab", "cd", "", []),
    ("ab", "cd", "xb", ["1 images of val.txt are in labeled.txt too, the first: /data/b.jpg", "mIoU"]),
    ("ab", "cde", "ced", ["3 images of val.txt are in unlabeled.txt too, the first: /data/c.jpg", "mIoU"]),
    ("ab", "ba", "c", ["2 images of unlabeled.txt are in labeled.txt too", "twice"]),
])
def test_lists_that_share_images_are_named(labelled, unlabelled, val, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "_readable", lambda *_: None)
    preflight.preflight(Config(out=tmp_path),
                        lists={"labeled.txt": samples(*labelled), "unlabeled.txt": samples(*unlabelled),
                                                     "val.txt": samples(*val)}, weights=1, checks=[])
    err = capsys.readouterr().err
    assert all(text in err for text in said) and ("warning" in err) == bool(said)


def test_unlabellable_image_is_named_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_readable", lambda *_: None)
    large = [Sample(key=key, image=f"/data/{key}.jpg", width=6000, height=4000) for key in "xy"]

    def check(**changes) -> None:
        preflight.preflight(Config(out=tmp_path, **changes),
                            lists={"labeled.txt": samples("a"), "unlabeled.txt": [
            *samples("b"), *large]}, weights=1, checks=[])

    with pytest.raises(UserError,
                       match=r"2 images .* 16777216 .*/data/x.jpg, 6000x4000.*--label.max-pixels 24000000"):
        check()
    check(method="supervised")
    check(label=LabelConfig(max_pixels=24000000))
