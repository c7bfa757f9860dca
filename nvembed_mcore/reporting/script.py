"""The numbers of curves under the pointer, or where the arrow keys lead. The page is whole without this."""

from __future__ import annotations

import base64
import hashlib

SCRIPT = """
"use strict";
const SVG = "http://www.w3.org/2000/svg";
const keys = [...document.querySelectorAll("[data-run]")].map((key) => ({
  name: key.querySelector(".name").textContent,
  color: key.dataset.color,
  isShown: () => key.querySelector("input").checked,
}));
const short = (value) => String(Number(value.toPrecision(6)));
const nearest = (xs, x) => xs.reduce((best, one, i) => (Math.abs(one - x) < Math.abs(xs[best] - x) ? i : best), 0);

function watch(plot) {
  const { box, x, y, log, unit, curves } = JSON.parse(plot.dataset.curves);
  const [left, top, width, height] = box;
  const scale = log ? Math.log : (value) => value;
  const svg = plot.querySelector("svg");
  const cursor = svg.appendChild(document.createElementNS(SVG, "g"));
  const tip = plot.appendChild(document.createElement("div"));
  tip.className = "tip";
  const every = [...new Set(curves.flatMap(([, xs]) => xs))].sort((a, b) => a - b);
  let at = every.length - 1;

  const add = (name, attributes) => {
    const one = cursor.appendChild(document.createElementNS(SVG, name));
    Object.entries(attributes).forEach(([key, value]) => one.setAttribute(key, value));
  };
  const hide = () => { cursor.replaceChildren(); tip.replaceChildren(); };
  const line = (text, color) => {
    const one = tip.appendChild(document.createElement("div"));
    one.textContent = text;
    if (color) one.style.borderColor = color;
  };
  const show = () => {
    hide();
    const place = left + ((every[at] - x[0]) / (x[1] - x[0])) * width;
    add("line", { x1: place, x2: place, y1: top, y2: top + height, stroke: "currentColor", "stroke-opacity": 0.5 });
    line(`${unit} ${short(every[at])}`);
    for (const [run, xs, ys] of curves) {
      if (!keys[run].isShown()) continue;
      const i = nearest(xs, every[at]);
      const cx = left + ((xs[i] - x[0]) / (x[1] - x[0])) * width;
      const cy = top + height * (1 - (scale(ys[i]) - scale(y[0])) / (scale(y[1]) - scale(y[0])));
      add("circle", { cx, cy, r: 3, fill: keys[run].color });
      const where = xs[i] === every[at] ? "" : ` (${unit} ${short(xs[i])})`;
      line(`${keys[run].name}: ${short(ys[i])}${where}`, keys[run].color);
    }
    const share = place / svg.viewBox.baseVal.width;
    tip.style.left = share < 0.5 ? `${100 * share + 2}%` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `${102 - 100 * share}%`;
  };

  plot.tabIndex = 0;
  plot.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const place = ((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width;
    at = nearest(every, x[0] + ((place - left) / width) * (x[1] - x[0]));
    show();
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("focus", show);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    at = Math.min(Math.max(at + by, 0), every.length - 1);
    show();
  });
}
document.querySelectorAll("[data-curves]").forEach(watch);
"""

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)
"""What the page may do: this script and no other, and nothing from anywhere else."""
