"""The page in Chromium: generating, stopping, colours, a narrow screen, the keyboard, and dark mode."""

import time

import pytest
from serving import Served, write_run

browser = pytest.importorskip("browser", reason="needs playwright")
pytestmark = pytest.mark.skipif(not browser.CHROMIUM, reason="needs Chromium: apt-get install chromium")

NAME = "out-<b>'&quot;"  # a model's name, which the page shows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("page")
    write_run(place / NAME)
    return place


@pytest.fixture(scope="module")
def server(place):
    served = Served(place, f"--out_dir={NAME}", before=slow_down)
    yield served
    served.close()


def slow_down():
    """Runs in the server's process before it starts: long texts take long enough to be stopped."""
    import time

    from nanogpt import generate

    def step(self, real=generate.Engine.step):
        time.sleep(0.005)
        return real(self)

    generate.Engine.step = step


@pytest.fixture(scope="module", params=["wide", "narrow and dark"])
def window(request):
    wide = dict(viewport=dict(width=1200, height=900))
    narrow = dict(viewport=dict(width=390, height=844), color_scheme="dark", is_mobile=True)
    with browser.open_window(**(wide if request.param == "wide" else narrow)) as window:
        window.set_default_timeout(120_000)
        yield window


@pytest.fixture
def page(window, server):
    """The page, just loaded; at the end, the browser must not have reported any error or warning."""
    errors = []

    def note_message(message):
        if message.type in ("error", "warning"):
            errors.append(message.text)

    def note_error(error):
        errors.append(error.message)

    window.on("console", note_message)
    window.on("pageerror", note_error)
    open_page(window, server)
    yield window
    window.remove_listener("console", note_message)
    window.remove_listener("pageerror", note_error)
    assert errors == []
    assert window.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"


def open_page(window, server):
    window.goto(server.address + "/")
    wait(window, "document.querySelector('#facts').textContent || !document.querySelector('#problem').hidden")


def choose(page, **values):
    """Set sliders and fields, with the events that a user causes."""
    for id, value in values.items():
        page.evaluate(
            "([id, value]) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event('input')) }",
            [id, value],
        )


def wait(page, condition):
    """Return when a JavaScript expression is true. (The page's policy forbids Playwright's own `wait_for_function`.)"""
    end = time.monotonic() + 120
    while not page.evaluate(f"Boolean({condition})"):
        assert time.monotonic() < end, f"still not: {condition}"
        page.wait_for_timeout(20)


def state(page):
    return page.evaluate("document.body.dataset.state")


def shown(page, selector):
    return page.text_content(selector)


def generate(page, prompt="abc", **values):
    """Generate a whole text, and return what is shown."""
    choose(page, **{"seed": 5, "temperature": 1, "max_tokens": 60} | values)
    page.fill("#prompt", prompt)
    page.click("#go")
    wait(page, "document.body.dataset.state === 'done' || document.body.dataset.state === 'failed'")
    return shown(page, "#text")


def test_a_click_starts_a_stream_and_another_stops_it(page, server):
    choose(page, max_tokens=2000)
    page.fill("#prompt", "abc")
    page.click("#go")
    wait(page, "tokens.length > 5")
    page.click("#go")  # which says Stop now
    wait(page, "document.body.dataset.state !== 'writing'")
    assert state(page) == "stopped" and 5 < page.evaluate("tokens.length") < 2000
    assert "tokens" in shown(page, "#stats") and shown(page, "#go") == "Generate"
    server.until("texts", 0)


def test_text_that_looks_like_html_is_shown_as_text(page, server):
    text = server.text(seed=5, temperature=1, max_tokens=200)
    assert "<" in text and "&" in text
    assert generate(page, max_tokens=200) == "abc" + text
    assert shown(page, "#name") == NAME
    assert page.evaluate("document.querySelectorAll('#text *:not(span), #name *').length") == 0


def test_a_prompt_that_looks_like_html_is_shown_as_text(page):
    prompt = "<script>abc</script><i a=b>"
    assert generate(page, prompt).startswith(prompt)
    assert page.evaluate("document.querySelectorAll('#text script, #text i').length") == 0


def test_colours_and_alternatives_under_the_pointer(page):
    generate(page)
    clear = "rgba(0, 0, 0, 0)"
    colour = "getComputedStyle(tokens.find(t => Math.exp(t.logprob) < 0.2).span).backgroundColor"
    assert page.evaluate(colour) == clear and page.evaluate("document.getElementById('more').hidden")
    page.click(".switch")
    assert page.evaluate(colour) != clear
    page.hover("#text .token:nth-of-type(4)")
    wait(page, "!document.getElementById('more').hidden")
    rows = page.evaluate("[...document.querySelectorAll('#more li')].map(li => li.lastChild.textContent)")
    assert len(rows) in (6, 7) and all(row.endswith(" %") for row in rows)
    chosen = page.evaluate("document.querySelector('#more .chosen').firstChild.textContent")
    assert chosen == page.evaluate("visible(tokens[2].name)")
    box = page.evaluate(
        "(r => [r.left, innerWidth - r.right, r.top])(document.getElementById('more').getBoundingClientRect())"
    )
    assert min(box) >= 0
    page.click(".switch")
    assert page.evaluate(colour) == clear and page.evaluate("document.getElementById('more').hidden")


def test_alternatives_can_be_shown_with_the_keyboard_alone(page):
    generate(page)
    page.evaluate("document.getElementById('colours').focus()")
    for key in (" ", "Tab"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.id") == "text"
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.evaluate("here") == 1
    assert page.evaluate("visible(tokens[1].name)") in shown(page, "#said") and "instead" in shown(page, "#said")
    page.keyboard.press("Escape")
    assert page.evaluate("document.getElementById('more').hidden")


def test_generating_with_the_keyboard_alone(page):
    page.evaluate("document.getElementById('prompt').focus()")
    page.keyboard.type("ab")
    page.keyboard.press("Control+Enter")
    wait(page, "tokens.length > 0")
    assert shown(page, "#text .prompt") == "ab"
    wait(page, "document.body.dataset.state === 'done'")


def test_escape_stops(page):
    choose(page, max_tokens=2000)
    page.fill("#prompt", "abc")
    page.click("#go")
    wait(page, "tokens.length > 5")
    page.keyboard.press("Escape")
    wait(page, "document.body.dataset.state === 'stopped'")


def test_continue_extends_the_text(page):
    before = generate(page)
    choose(page, seed=6)
    page.click("#on")
    wait(page, "document.body.dataset.state === 'done' && tokens.length === 60")
    assert shown(page, "#text .prompt") == before and len(shown(page, "#text")) > len(before)


def test_continue_sends_no_more_than_the_server_accepts(page):
    before = generate(page)
    page.evaluate("model.max_prompt = 20")
    page.click("#on")
    wait(page, "document.body.dataset.state === 'done'")
    assert shown(page, "#text .prompt") == before[-20:]


def test_no_text_can_be_longer_than_the_server_allows(page):
    assert page.evaluate("document.getElementById('max_tokens').max") == "2000"
    page.evaluate(
        "window.real = ask; ask = async () => new Response(JSON.stringify({ data: [{ ...model, max_tokens: 70 }] }))"
    )
    page.evaluate("meet()")
    assert page.evaluate("ask = real; document.getElementById('max_tokens').max") == "70"


def test_an_error_of_the_server_is_shown_with_its_message(window, server):
    open_page(window, server)
    generate(window, prompt="abcX")
    assert "'X' (U+0058)" in shown(window, "#problem") and state(window) == "failed"
    assert window.evaluate("document.getElementById('problem').getAttribute('role')") == "alert"
    generate(window)
    assert window.evaluate("document.getElementById('problem').hidden")


def test_the_loss_curve_is_drawn_and_described(page):
    wait(page, "!document.getElementById('curve').hidden")
    said = page.evaluate("document.querySelector('#curve svg').getAttribute('aria-label')")
    assert said == "Validation loss 3.10 at iteration 0, 2.1000 at best, at iteration 20"


def drawn(page, name):
    """The points [x, y] of a line of the curve; y grows downwards."""
    line = page.evaluate("name => document.querySelector('#curve path.' + name).getAttribute('d')", name)
    return [[float(number) for number in point.split()] for point in line.removeprefix("M").split("L")]


def test_the_curve_fills_the_picture_without_the_loss_of_the_untrained_model(page):
    wait(page, "!document.getElementById('curve').hidden")
    train, val = drawn(page, "train"), drawn(page, "val")
    assert (train[0], train[-1], len(train)) == ([26, 6], [250, 122], 21)  # from 3.0 down to 2.0
    assert [x for x, _ in val] == [82, 138, 194, 250]  # without that of the untrained model, above the picture
    assert 6 < val[0][1] < val[-1][1] < 122


@pytest.mark.parametrize("low, high", [(1.94, 2.13), (1.9, 2.6), (1.9, 4.2), (0.2, 11.0)])
def test_the_labels_of_the_curve_are_evenly_spaced(page, low, high):
    wait(page, "!document.getElementById('curve').hidden")
    page.evaluate("([low, high]) => draw({train: [[0, high]], val: [[0, high], [5, low]]})", [low, high])
    labels = page.evaluate(
        "[...[...document.querySelectorAll('#curve svg')].at(-1).querySelectorAll('text[text-anchor=end]')].map(t => t.textContent)"
    )
    values = [float(label) for label in labels if "iterations" not in label]
    gaps = {round(b - a, 9) for a, b in zip(values, values[1:], strict=False)}
    assert len(values) >= 2 and len(gaps) == 1 and low <= values[0] <= values[-1] <= high


def test_a_curve_that_does_not_fall_is_drawn_too(page):
    wait(page, "!document.getElementById('curve').hidden")
    page.evaluate("document.querySelector('#curve svg').remove(); draw({train: [], val: [[0, 2], [5, 2]]})")
    assert drawn(page, "val") == [[26, 122], [250, 122]]


def test_fields_have_labels_and_nothing_is_loaded_from_elsewhere(page, server):
    unnamed = "[...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length).length"
    assert page.evaluate(unnamed) == 0
    loaded = page.evaluate("performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded and all(url.startswith(server.address) for url in loaded)


# The contrast of two colours: WCAG 2, "relative luminance" and "contrast ratio". Backgrounds may be transparent.
CONTRAST = """selector => {
const numbers = c => c.match(/[\\d.]+/g).map(Number);
const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = e => { let layers = []; for (; e; e = e.parentElement) { layers.push(getComputedStyle(e).backgroundColor); }
  return layers.reverse().reduce((under, c) => {
    const parts = numbers(c), [r, g, b] = c.startsWith('color') ? parts.map(v => v * 255) : parts, a = parts[3] ?? 1;
    return [r, g, b].map((v, i) => a * v + (1 - a) * under[i]); }, [255, 255, 255]); };
return [...document.querySelectorAll(selector)].filter(e => e.offsetParent && e.textContent.trim()).map(e => {
  const a = light(numbers(getComputedStyle(e).color)), b = light(behind(e));
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.slice(0, 20)]; });
}"""


def test_all_text_has_enough_contrast(page):
    generate(page)
    page.click(".switch")
    page.hover("#text .token:nth-of-type(4)")
    wait(page, "!document.getElementById('more').hidden")
    found = page.evaluate(
        CONTRAST, "h1, h2, p, label, button, output, summary, #text .token, #text .prompt, #more span, #legend span"
    )
    assert len(found) > 60
    assert min(found)[0] >= 4.5, min(found)


def test_the_page_asks_for_the_key(window, place):
    served = Served(place, f"--out_dir={NAME}", name="log-locked", env={"NANOGPT_API_KEY": "sesame"})
    try:
        open_page(window, served)
        assert not window.evaluate("document.getElementById('key').hidden") and shown(window, "#go") == "Unlock"
        window.fill("#secret", "wrong")
        window.press("#secret", "Enter")
        wait(window, "document.getElementById('problem').textContent === 'wrong API key'")
        window.fill("#secret", "sesame")
        window.click("#go")
        wait(window, "document.getElementById('facts').textContent")
        assert window.evaluate("document.getElementById('key').hidden")
        assert len(generate(window)) > 60
        window.evaluate("sessionStorage.clear()")
    finally:
        served.close()
    window.click("#go")  # and the server is gone
    wait(window, "document.body.dataset.state === 'failed'")
    assert "cannot be reached" in shown(window, "#problem")
