"""The page in a browser: `make test-browser`. It needs Chromium, and Playwright to drive it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from involution.show.capture import Captured
from involution.show.command import capture
from involution.show.mirror import mirror_kernels
from involution.show.page import write_page
from involution.show.subject import subject

pytestmark = pytest.mark.browser
KEYS = {"ArrowUp": (-1, 0), "ArrowDown": (1, 0), "ArrowLeft": (0, -1), "ArrowRight": (0, 1)}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Captured], Path]:
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    shown = subject("sample")
    found = capture(shown)
    write_page(shown, found, *mirror_kernels(shown), path)
    return found, path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=[{}, {"color_scheme": "dark"}, {"viewport": {"width": 360, "height": 800}, "has_touch": True}])
def page(request: pytest.FixtureRequest, browser: Any, captured: tuple[dict[str, Captured], Path]) -> Iterator[Any]:
    """The page, watched for errors and requests."""
    context = browser.new_context(**request.param)
    found, told = context.new_page(), []
    found.on("console", lambda message: told.append(message.text))
    found.on("pageerror", lambda error: told.append(str(error)))
    found.on("request", lambda asked: None if asked.url.startswith(("data:", "file:")) else told.append(asked.url))
    found.goto(captured[1].as_uri())
    found.wait_for_function("document.querySelector('#here').children.length > 0")
    yield found
    context.close()
    assert told == []


def at(page: Any) -> tuple[int, int]:
    words = page.inner_text("#whereHere").replace(",", "").split()
    return int(words[2]), int(words[4])


def numbers(page: Any, table: str) -> np.ndarray:
    return np.array([[float(cell) for cell in row.split("\t")] for row in page.inner_text(table).split("\n")])


def check(page: Any, each: Captured, group: int = 0) -> None:
    """Compare all that the page tells of a position with what was captured."""
    row, column = at(page)
    own = each.kernel[0, ..., row, column]
    found = torch.tensor(page.evaluate("[...kernel(state.layer, state.row, state.column)]")).view(own.shape)
    torch.testing.assert_close(found, own, rtol=0, atol=2e-3 * float(own.abs().max()) + 1e-4)
    sums = [float(text.split(": ")[1]) for text in page.locator("#here span").all_inner_texts()]
    assert sums == pytest.approx(own.sum((1, 2)).tolist(), rel=0.02, abs=0.1)
    kernel, patch = numbers(page, "#kernelTable"), numbers(page, "#patchTable")
    np.testing.assert_allclose(kernel, own[group].numpy(), rtol=0.02, atol=0.02)
    channel = group * each.layer.channels // each.layer.groups
    np.testing.assert_allclose(patch, each.patch(row, column)[channel].numpy(), rtol=0.02, atol=0.02)
    output = float(page.inner_text("#result").split("= ")[1])
    scale = float((own[group] * each.patch(row, column)[channel]).abs().sum())
    assert output == pytest.approx(float(each.output[0, channel, row, column]), abs=3e-3 * scale + 1e-3)


def test_the_pointer_generates_kernels(page: Any, captured: tuple[dict[str, Captured], Path]) -> None:
    each = captured[0]["layer3.3.conv2"]
    page.locator("#stage").scroll_into_view_if_needed()
    box = page.locator("#stage").bounding_box()
    height, width = each.kernel.shape[-2:]
    for x, y in ((0.02, 0.02), (0.3, 0.8), (0.97, 0.55)):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        assert at(page) == (int(y * height), int(x * width))
        check(page, each)
    assert page.locator("#pinnedRow").is_hidden()
    page.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.8 * box["height"])
    assert page.inner_text("#wherePinned") == f"Pinned: row {int(0.3 * height)}, column {int(0.3 * width)}"
    pinned = each.kernel[0, ..., int(0.3 * height), int(0.3 * width)].sum((1, 2))
    told = [float(text.split(": ")[1]) for text in page.locator("#pinned span").all_inner_texts()]
    assert told == pytest.approx(pinned.tolist(), rel=0.02, abs=0.1)


def test_the_keyboard_does_all(page: Any, captured: tuple[dict[str, Captured], Path]) -> None:
    page.focus("#layer")
    page.keyboard.press("Home")
    for name, each in captured[0].items():  # the layers in their order
        assert page.inner_text("#layerName").startswith(f"{name}: ")
        assert page.get_attribute("#layer", "aria-valuetext") == name
        check(page, each)
        page.keyboard.press("ArrowRight")
    page.focus("#stage")
    before = at(page)
    for key, (down, right) in KEYS.items():
        page.keyboard.press(key)
        height, width = each.kernel.shape[-2:]
        before = min(max(before[0] + down, 0), height - 1), min(max(before[1] + right, 0), width - 1)
        assert at(page) == before
        assert f"row {before[0]}, column {before[1]}: the kernel of group 0 sums" in page.inner_text("#live")
    page.keyboard.press("Enter")
    assert page.locator("#pinnedRow").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#pinnedRow").is_hidden()
    page.focus("#here button:nth-child(2)")
    page.keyboard.press("Enter")
    assert page.get_attribute("#here button:nth-child(2)", "aria-pressed") == "true"
    check(page, each, group=1)
    page.focus("#heat")
    page.keyboard.press("Space")
    found = np.array(page.evaluate("[...sums(state.layer, state.group)]")).reshape(each.kernel.shape[-2:])
    expected = each.sums()[0, 1].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3 * np.abs(expected).max())


def test_the_convolution_stays_and_the_steps_play(page: Any) -> None:
    fixed = page.locator("#fixed span").all_inner_texts()
    page.focus("#stage")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#fixed span").all_inner_texts() == fixed
    assert page.locator("#steps li.now h2").inner_text() == "5 Multiply and add"
    page.click("#next")
    for number in range(1, 6):
        assert page.inner_text("#stepName").startswith(f"Step {number} of 5: ")
        assert page.locator("#steps li.now h2").inner_text().startswith(f"{number} ")
        page.click("#next")
    page.click("#play")
    page.wait_for_function("document.querySelector('#stepName').textContent.startsWith('Step 3')")
    page.click("#play")
    assert page.inner_text("#play") == "Play"


def test_everything_fits_and_is_labelled(page: Any, tmp_path: Path) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    named = "e => e.ariaLabel || e.innerText || (e.labels && e.labels.length)"
    assert page.evaluate(f"[...document.querySelectorAll('button, input')].every({named})")
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    with Image.open(tmp_path / "page.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 500
