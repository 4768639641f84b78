"use strict";
(() => {
  const all = (query, from = document) => [...from.querySelectorAll(query)];
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const hidden = new Set();

  // "var(--name)" and "var(--name)@0.2" become the colours of the present theme.
  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    return (value) => {
      const found = /^var\((--[\w-]+)\)(?:@([\d.]+))?$/.exec(value);
      if (!found) return value;
      const hex = style.getPropertyValue(found[1]).trim();
      if (!found[2]) return hex;
      const parts = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
      return `rgba(${parts.join(",")},${found[2]})`;
    };
  };
  const resolve = (value, colour) => {
    if (typeof value === "string") return colour(value);
    if (Array.isArray(value)) return value.map((part) => resolve(part, colour));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolve(v, colour)]));
  };
  const axis = ({ title, ...given }, colour, size) => ({
    title: { ...title, font: { size } },
    gridcolor: colour("var(--line)"), linecolor: colour("var(--muted)"), zerolinecolor: colour("var(--line)"),
    zerolinewidth: 1, showline: true, ticks: "outside", tickcolor: colour("var(--muted)"), automargin: true,
    nticks: 7, ...resolve(given, colour),
  });

  const draw = () => {
    const colour = theme();
    for (const plot of plots) {
      const place = document.getElementById(plot.id);
      if (!place) continue;
      const narrow = place.clientWidth < 480;
      const size = narrow ? 12 : 14;
      const data = resolve(plot.data, colour).map((trace) => ({
        showlegend: false, ...trace, visible: !hidden.has(trace.meta),
        hoverlabel: { bgcolor: colour("var(--card)"), bordercolor: colour("var(--muted)"), font: { color: colour("var(--ink)") } },
      }));
      const layout = {
        ...resolve(plot.layout, colour),
        xaxis: axis(plot.layout.xaxis, colour, size), yaxis: axis(plot.layout.yaxis, colour, size),
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
        font: { family: getComputedStyle(document.body).fontFamily, size, color: colour("var(--ink)") },
        width: place.clientWidth, height: place.clientHeight,
        margin: { l: 62, r: narrow ? 12 : 24, t: 24, b: 54 }, dragmode: narrow ? false : "zoom",
      };
      Plotly.react(place, data, layout, { displayModeBar: false });
    }
  };
  if (plots.length) {
    draw();
    let width = innerWidth;
    addEventListener("resize", () => {
      if (width !== innerWidth) draw();
      width = innerWidth;
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    for (const button of all(".legend button")) {
      button.addEventListener("click", () => {
        const on = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(on));
        hidden[on ? "delete" : "add"](button.dataset.arm);
        draw();
      });
    }
  }

  for (const trail of all(".trail")) {
    const says = trail.querySelector("output");
    const line = trail.querySelector(".tokens");
    const tokens = all("span", line);
    let at = -1;
    const show = (token) => {
      tokens[at]?.classList.remove("at");
      at = tokens.indexOf(token);
      token.classList.add("at");
      says.textContent = `${JSON.stringify(token.textContent)}  ${token.dataset.d}`;
    };
    line.addEventListener("mouseover", (event) => tokens.includes(event.target) && show(event.target));
    line.addEventListener("click", (event) => tokens.includes(event.target) && show(event.target));
    line.addEventListener("focus", () => tokens.length && show(tokens[Math.max(at, 0)]));
    line.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (to === undefined || !tokens[to]) return;
      event.preventDefault();
      show(tokens[to]);
    });
  }

  const find = document.getElementById("find");
  if (find) {
    const rows = all(".row").map((row) => ({
      row, text: row.querySelector(".prompt").textContent.toLowerCase(),
      cells: all(".cell", row).map((cell) => ({
        cell, arm: cell.dataset.arm, same: "same" in cell.dataset,
        text: cell.querySelector(".answer").textContent.toLowerCase(),
      })),
    }));
    const boxes = all("input[name=arm]");
    const differs = document.getElementById("differs");
    const shown = document.getElementById("shown");
    const sift = () => {
      const arms = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
      const words = find.value.trim().toLowerCase();
      let count = 0;
      for (const { row, text, cells } of rows) {
        const seen = cells.filter(({ cell, arm }) => {
          cell.hidden = boxes.some((box) => box.value === arm) && !arms.has(arm);
          return !cell.hidden;
        });
        const found = !words || text.includes(words) || seen.some((one) => one.text.includes(words));
        row.hidden = !(seen.length && found && (!differs.checked || seen.some((one) => !one.same)));
        count += !row.hidden;
      }
      shown.textContent = `${count} of ${rows.length} prompts`;
    };
    document.querySelector(".filters").addEventListener("input", sift);
    document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
    sift();
  }
})();
