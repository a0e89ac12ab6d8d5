"""The client of overhead_handwritten.sh: every prompt of a folder, one after the other.

    python overhead_handwritten.py BASE_URL PROMPTS RESULTS"""

import json
import os
import sys
import urllib.request

try:
    from openai import OpenAI
except ImportError:
    OpenAI = None

BASE_URL, PROMPTS, RESULTS = sys.argv[1:4]
MAX_TOKENS = int(os.environ.get("MAX_TOKENS", "32"))


def with_openai():
    client = OpenAI(base_url=BASE_URL, api_key="none")

    def ask(prompt):
        answer = client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": prompt}], max_tokens=MAX_TOKENS)
        return answer.choices[0].message.content
    return ask


def with_urllib(prompt):
    body = {"model": "default", "messages": [{"role": "user", "content": prompt}], "max_tokens": MAX_TOKENS}
    request = urllib.request.Request(BASE_URL + "/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


ask = with_openai() if OpenAI else with_urllib
for name in sorted(os.listdir(PROMPTS)):
    with open(os.path.join(PROMPTS, name)) as file:
        answer = ask(file.read())
    with open(os.path.join(RESULTS, "result_" + name), "w") as file:
        file.write(answer)
