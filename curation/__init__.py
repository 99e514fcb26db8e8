"""From lines to training tars.

The stages in order, tables in -> tables out:

1. register: sources -> ``sources``, ``urls``
2. screen_keys, url_duplicates, screened: ``urls`` -> ``screened``
3. fetch, fetched: ``screened``, ``urls`` -> ``images``, ``fetch_log``; ``fetched``
4. look: ``fetched``, ``images`` -> ``hashes``, ``detections``
5. safety: ``fetched``, ``hashes``, ``detections`` -> ``safety``
6. fit_pca_hash, pca_hash, near_codes, near_pairs, near_groups, near: ``safety``, ``hashes`` -> ``near``
7. fit_descriptor, describe: ``near``, ``detections`` -> ``descriptors``
8. fit_quantiser, edges, components, duplicates: ``near``, ``descriptors`` -> ``edges``, ``components``, ``duplicates``
9. leakage: ``duplicates``, ``reference_edges`` -> ``leakage``
10. fit_embedder, embed: ``leakage``, ``detections`` -> ``embeddings``
11. fit_kmeans, fit_hierarchy, cluster: ``leakage``, ``embeddings`` -> ``clusters``
12. queries, quotas, candidates, neighbours: ``clusters``, ``embeddings`` -> ``quotas``, ``neighbours``, ``retrieval``
13. offers, selection: ``leakage``, ``neighbours`` -> ``offers``, ``selection``, ``choices``
14. export: ``selection``, ``urls``, ``images``, ``detections`` -> ``tars/``, ``manifest``, ``shards``
"""
