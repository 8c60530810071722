"use strict";
// Figures are drawn when they come near the screen; their JSON stands beside them.
const quiet = { displayModeBar: false, responsive: true, plotlyServerURL: "", showLink: false };
const dark = matchMedia("(prefers-color-scheme: dark)");
const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
const plots = [...document.querySelectorAll(".plot")];

function draw(plot) {
  if (plot.dataset.drawn) return;
  plot.dataset.drawn = "yes";
  const figure = JSON.parse(plot.nextElementSibling.textContent);
  figure.layout.font.color = ink();
  Plotly.newPlot(plot, figure.data, figure.layout, quiet);
}

const near = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
  { rootMargin: "600px" },
);
plots.forEach((plot) => near.observe(plot));
addEventListener("beforeprint", () => plots.forEach(draw));
dark.addEventListener("change", () =>
  plots.filter((plot) => plot.dataset.drawn).forEach((plot) => Plotly.relayout(plot, { "font.color": ink() })),
);

document.querySelectorAll('input[type="search"]').forEach((search) => {
  const rows = [...search.nextElementSibling.querySelectorAll("tbody tr")];
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    });
  });
});
