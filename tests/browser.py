"""A real Chromium, driven through WebDriver (W3C), which needs nothing but HTTP: for the tests of the page."""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, fixed by the standard
KEYS = {
    "Enter": "\ue007",
    "Escape": "\ue00c",
    "Left": "\ue012",
    "Right": "\ue014",
    "Tab": "\ue004",
    "Control": "\ue009",
}


class Browser:
    """A window of its own, width x height, with nobody's profile."""

    def __init__(self, width=1200, height=900, dark=False):
        self.driver = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        line = next(line for line in self.driver.stdout if "started successfully on port" in line)
        self.address = "http://127.0.0.1:" + re.search(r"on port (\d+)", line)[1]
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        flags += ["--force-dark-mode"] if dark else []
        options = {"binary": CHROMIUM, "args": flags}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self.session = ""
        self.session = "/session/" + self.send("POST", "/session", capabilities=wanted)["sessionId"]
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.devtools(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def send(self, method, path, **body):
        """One command of the standard; what it returns."""
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(
            self.address + self.session + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as e:
            raise AssertionError(json.load(e)["value"]["message"]) from None

    def devtools(self, command, **params):
        return self.send("POST", "/goog/cdp/execute", cmd=command, params=params)

    def open(self, url):
        self.send("POST", "/url", url=url)

    def run(self, script, *args):
        """What a JavaScript function's body returns."""
        return self.send("POST", "/execute/sync", script=script, args=list(args))

    def wait(self, condition, timeout=120):
        """Return the value of a JavaScript expression as soon as it is true."""
        end = time.monotonic() + timeout
        while not (value := self.run(f"return {condition}")):
            assert time.monotonic() < end, f"still not: {condition}"
            time.sleep(0.02)
        return value

    def find(self, selector):
        return self.send("POST", "/element", using="css selector", value=selector)[ELEMENT]

    def click(self, selector):
        self.send("POST", f"/element/{self.find(selector)}/click")

    def type(self, selector, text):
        self.send("POST", f"/element/{self.find(selector)}/value", text=text)

    def press(self, *keys):
        """Keys one after the other, on whatever has the focus."""
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.send("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def hover(self, selector):
        origin = {ELEMENT: self.find(selector)}
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": origin}
        self.send("POST", "/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [move]}])

    def log(self):
        """What the page has written to the console, errors and refusals of the browser included."""
        return [entry["message"] for entry in self.send("POST", "/se/log", type="browser")]

    def screenshot(self, path):
        with open(path, "wb") as f:
            f.write(base64.b64decode(self.send("GET", "/screenshot")))

    def close(self):
        try:
            if self.session:
                self.send("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.communicate()
