"""Ask a served student about a picture, with the official OpenAI client.

Start the service first (`make serve`, or `python -m serve_apps.app --model RUN/export`), then run
`python examples/01_ask_about_a_picture.py`. `OPENAI_BASE_URL` names a service elsewhere.
"""

import base64
import os
from io import BytesIO

from openai import OpenAI
from PIL import Image, ImageDraw

client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = client.models.list().data[0].id

picture = Image.new("RGB", (64, 64), "white")
ImageDraw.Draw(picture).ellipse((16, 16, 44, 44), fill="red")
buffer = BytesIO()
picture.save(buffer, format="PNG")
url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

for question in ("what shape is in the image?", "what color is the circle?", "is there a blue circle?"):
    events = client.chat.completions.create(
        model=model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": question},
                ],
            }
        ],
        max_tokens=16,
        stream=True,
    )
    print(question, end=" ", flush=True)
    for event in events:
        print(event.choices[0].delta.content or "", end="", flush=True)
    print()
