"""`/docs`: the OpenAPI description as one page, made here. Fetches nothing: it works offline, and no other site's script
comes near a token."""

from __future__ import annotations

import json
import re
from html import escape
from typing import Any

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
code,pre{font:13px/1.4 ui-monospace,monospace;background:#f4f4f4;border-radius:4px}code{padding:.1em .3em}
pre{padding:.8em;overflow:auto}h2{border-top:1px solid #ddd;padding-top:1rem;margin-top:2.5rem}
h3 code{background:#e7eefc}table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;
padding:.3em .6em;border-bottom:1px solid #eee}td:first-child{white-space:nowrap}small{color:#666}"""


def docs_page(spec: dict[str, Any]) -> str:
    """The page of an OpenAPI document."""
    info = spec["info"]
    parts = [f"<h1>{escape(info['title'])} <small>{escape(info['version'])}</small></h1>", _text(info["description"])]
    parts.append('<p>As a document for machines: <a href="/openapi.json">/openapi.json</a></p>')
    by_tag: dict[str, list[str]] = {}
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            tag = operation.get("tags", ["Other"])[0]
            by_tag.setdefault(tag, []).append(_operation(method.upper(), path, operation))
    for tag, operations in by_tag.items():
        parts += [f"<h2>{escape(tag)}</h2>", *operations]
    head = f'<meta charset="utf-8"><title>{escape(info["title"])}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>"


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [f"<h3><code>{method} {escape(path)}</code> {escape(operation.get('summary', ''))}</h3>"]
    parts.append(_text(operation.get("description", "")))
    rows = [
        (each["name"], f"{_kind(each['schema'])}, in the {each['in']}", each.get("description", ""))
        for each in operation.get("parameters", [])
    ]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = body.get("schema", {})
    required = schema.get("required", [])
    for name, said in schema.get("properties", {}).items():
        rows.append((name, _kind(said) + (", required" if name in required else ""), said.get("description", "")))
    if rows:
        cells = (f"<tr><td><code>{escape(n)}</code><td>{escape(k)}<td>{_inline(t)}</tr>" for n, k, t in rows)
        parts.append(f"<table><tr><th>field<th>type<th>what it does</tr>{''.join(cells)}</table>")
    for example in body.get("examples", {}).values():
        parts.append(f"<p>{_inline(example['summary'])}</p><pre>{escape(json.dumps(example['value'], indent=1))}</pre>")
    return "".join(parts)


def _kind(schema: dict[str, Any]) -> str:
    """A field's type and bounds, shortly."""
    found = next((each for each in schema.get("anyOf", []) if each.get("type") != "null"), schema)
    if "enum" in found:
        return " | ".join(map(str, found["enum"]))
    kind = str(found.get("type", "any"))
    low, high = found.get("minimum", found.get("minLength")), found.get("maximum", found.get("maxLength"))
    if low is None and high is None:
        return kind
    unit = " characters" if "maxLength" in found else ""
    return f"{kind}, {f'{low} to' if low is not None else 'up to'} {high}{unit}"


def _text(text: str) -> str:
    paragraphs = [" ".join(each.split()) for each in text.split("\n\n")]
    return "".join(f"<p>{_inline(each)}</p>" for each in paragraphs if each)


def _inline(text: str) -> str:
    """Escaped, with `code` and **bold**."""
    found = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", found)
