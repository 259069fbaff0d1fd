"""A real browser without a window, driven by the protocol of the W3C, WebDriver, over plain HTTP."""

import base64
import io
import json
import os
import shutil
import subprocess
import tempfile
import urllib.request

import numpy as np
import PIL.Image

DRIVER, BROWSER = (
    next(filter(None, map(shutil.which, names)), None)
    for names in (("chromedriver", "chromium-driver"), ("chromium", "chromium-browser", "google-chrome"))
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of a reference to an element


class Browser:
    """A session of chromium; a context manager, which ends it and all that it wrote."""

    def __init__(self, width=1300, height=900):
        self._folder = tempfile.TemporaryDirectory()
        self._driver = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self._environment()
        )
        port = next(line.split()[-1].rstrip(".") for line in self._driver.stdout if "started successfully" in line)
        self._address = f"http://127.0.0.1:{port}/session"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options += [f"--window-size={width},{height}", "--force-device-scale-factor=1"]
        wanted = {"goog:chromeOptions": {"binary": BROWSER, "args": options}, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._address += f"/{session['sessionId']}"

    def _environment(self):
        return {**os.environ, "HOME": self._folder.name, "TMPDIR": self._folder.name}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(20)
            self._driver.stdout.close()
            self._folder.cleanup()

    def _call(self, method, path, body=None):
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path):
        self._call("POST", "/url", {"url": path.as_uri()})

    def run(self, script, *arguments):
        """What the body of a function of JavaScript returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector):
        return self._call("POST", "/elements", {"using": "css selector", "value": selector})

    def click(self, element):
        self._call("POST", f"/element/{element[_ELEMENT]}/click")

    def press(self, keys):
        """Keys to what has the focus; \\ue012 and \\ue014 are the arrows to the left and to the right."""
        downs = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": downs}]})

    def drag(self, kind, start, end):
        """Press a pointer, "mouse" or "touch", at one place of the window, move it to another and lift it."""
        moves = [{"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)} for x, y in (start, end)]
        actions = [moves[0], {"type": "pointerDown", "button": 0}, moves[1], {"type": "pointerUp", "button": 0}]
        pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions}
        self._call("POST", "/actions", {"actions": [pointer]})

    def screenshot(self):
        """(H, W, 3) uint8 of the window."""
        content = base64.b64decode(self._call("GET", "/screenshot"))
        return np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB"))

    def messages(self):
        """What the page has said to the console, errors of scripts and of its policy included."""
        return [each["message"] for each in self._call("POST", "/se/log", {"type": "browser"})]
