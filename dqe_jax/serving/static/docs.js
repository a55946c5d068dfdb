"use strict";
// Shows /openapi.json: the routes, and the objects that they take and give.
const put = (parent, tag, text) => {
  const element = document.createElement(tag);
  element.textContent = text;
  parent.append(element);
  return element;
};
const nameOf = (schema) => (schema && schema.$ref ? schema.$ref.split("/").pop() : "");

fetch("/openapi.json")
  .then((answer) => answer.json())
  .then((api) => {
    document.getElementById("about").textContent = api.info.description;
    const routes = document.getElementById("routes");
    for (const [path, methods] of Object.entries(api.paths)) {
      for (const [method, route] of Object.entries(methods)) {
        const section = put(routes, "section", "");
        section.className = "route";
        put(put(section, "h2", ""), "code", `${method.toUpperCase()} ${path}`);
        put(section, "p", route.summary || "");
        const taken = nameOf(route.requestBody?.content?.["application/json"]?.schema);
        const given = nameOf(route.responses?.["200"]?.content?.["application/json"]?.schema);
        const told = [taken && `takes ${taken}`, given && `gives ${given}`].filter(Boolean).join(", ");
        const names = (route.parameters || []).map((one) => one.name).join(", ");
        put(section, "p", [told, names && `parameters: ${names}`].filter(Boolean).join("; ")).className = "muted";
      }
    }
    const objects = document.getElementById("objects");
    for (const [name, schema] of Object.entries(api.components.schemas)) {
      put(objects, "h3", name);
      put(objects, "p", schema.description || "");
      const shown = put(objects, "pre", JSON.stringify(schema.properties || schema, null, 1));
      shown.tabIndex = 0;
      shown.setAttribute("role", "region");
      shown.setAttribute("aria-label", name);
    }
    document.documentElement.dataset.ready = "yes";
  });
