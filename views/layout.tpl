<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{heading}}</title>
<meta name="description" content="{{summary}}">
% if site_url:
<meta property="og:type" content="website">
<meta property="og:title" content="{{title}}">
<meta property="og:description" content="{{summary}}">
<meta property="og:url" content="{{site_url}}/">
<meta property="og:image" content="{{site_url}}{{static_url("card.png")}}">
<meta property="og:image:width" content="1200">
<meta property="og:image:height" content="630">
<meta property="og:image:alt" content="{{question}}">
<meta name="twitter:card" content="summary_large_image">
% end
<meta name="color-scheme" content="light dark">
<meta name="theme-color" content="#f58bb6" media="(prefers-color-scheme: light)">
<meta name="theme-color" content="#8c3a5e" media="(prefers-color-scheme: dark)">
<link rel="icon" href="{{static_url("icon.svg")}}" type="image/svg+xml">
<link rel="stylesheet" href="{{static_url("catvote.css")}}">
</head>
<body>
<header><nav><a href="/">Vote</a> <a href="/history">History</a></nav></header>
<main>
{{!base}}
</main>
<footer>All we store is the vote and the time: no name, no cookie.</footer>
</body>
</html>
