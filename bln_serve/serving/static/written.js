// Writes a JSON document for people to read.

// One line for each list of numbers: an image is seen as one.
export function written(value, indent = "") {
  if (Array.isArray(value) && value.some((item) => typeof item === "object" && item !== null)) {
    const inner = `${indent} `;
    return `[\n${value.map((item) => inner + written(item, inner)).join(",\n")}\n${indent}]`;
  }
  if (Array.isArray(value)) return `[${value.map((item) => JSON.stringify(item)).join(", ")}]`;
  if (typeof value !== "object" || value === null) return JSON.stringify(value);
  const inner = `${indent} `;
  const items = Object.entries(value).map(([key, item]) => `${inner}${JSON.stringify(key)}: ${written(item, inner)}`);
  return `{\n${items.join(",\n")}\n${indent}}`;
}
