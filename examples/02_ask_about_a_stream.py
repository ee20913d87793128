"""Send frames to a served student while they happen, ask about them, and see which moments an answer rests on.

Start the service first (`make serve`, or `python -m serve_apps.app --model RUN/export`), then run
`python examples/02_ask_about_a_stream.py`. `OPENAI_BASE_URL` names a service elsewhere.
"""

import base64
import os
from io import BytesIO

import httpx
from PIL import Image, ImageDraw


def frame(colour: str) -> str:
    """A circle of a colour as a data: URI."""
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((16, 16, 44, 44), fill=colour)
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


address = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
with httpx.Client(base_url=address, timeout=60) as client:
    model = client.get("/models").json()["data"][0]["id"]
    stream = client.post("/streams", json={"model": model}).raise_for_status().json()["id"]
    for second, colour in enumerate(["red"] * 5 + ["blue"] * 5 + ["yellow"] * 5):
        frames = [{"time_s": float(second), "image": frame(colour)}]
        client.post(f"/streams/{stream}/frames", json={"frames": frames}).raise_for_status()

    for question in ("what color is the circle?", "is there a blue circle?"):
        answer = (
            client.post(f"/streams/{stream}/questions", json={"question": question, "max_tokens": 16})
            .raise_for_status()
            .json()
        )
        print(f"{question} {answer['answer']}")
        for moment in answer["evidence"][:3]:
            print(f"    at {moment['start_s']:.0f} s (score {moment['score']:.2f})")
    client.delete(f"/streams/{stream}").raise_for_status()
