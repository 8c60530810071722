// A row of the table, or its mark in a figure, shows the command that belongs to it.
const rows = JSON.parse(document.getElementById("points")?.textContent ?? "[]");
const lines = [...document.querySelectorAll("#table tbody tr")];
const copy = document.getElementById("copy");
function pick(k) {
  document.getElementById("command").textContent = rows[k].command || rows[k].instead;
  copy?.toggleAttribute("hidden", !rows[k].command);
  document.getElementById("picked").textContent = rows[k].said;
  lines.forEach((line, i) => line.classList.toggle("picked", i === k));
}
lines.forEach((line, k) => {
  const name = line.cells[0], button = document.createElement("button");
  button.type = "button";
  button.append(...name.childNodes);
  name.append(button);
  line.addEventListener("click", () => pick(k));
});
document.querySelectorAll("#figure [data-row]").forEach((mark) => mark.addEventListener("click", () => pick(Number(mark.dataset.row))));
copy?.addEventListener("click", () => navigator.clipboard.writeText(document.getElementById("command").textContent));
if (rows.length) pick(Math.max(rows.findIndex((row) => row.first), 0));
